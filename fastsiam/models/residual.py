"""Residual blocks whose batch norms, joins and ReLUs are the fused ones of `fused_norm`, where it takes the images.

Classes of modules change, and nothing else: parameters, buffers and their names stay, and in evaluation, for other
layouts and on other devices than CUDA and the CPU the forward is the library's own.
"""

import functools
from itertools import pairwise

from torch import nn

from fastsiam.errors import UserError
from fastsiam.kernels import max_pool
from fastsiam.models.batch_norm import PerViewBatchNorm2d
from fastsiam.models.encoder import CifarResNet
from fastsiam.models.fused_convolution import fused_convolution
from fastsiam.models.fused_norm import fused_norm, takes_kernels
from fastsiam.models.fused_pointwise import Begun, Shortcut, fused_pointwise, is_pointwise, takes_pointwise

# Layers in their order, of torchvision's and timm's classes of these names.
_LAYERS = {
    "BasicBlock": (("conv1", "bn1"), ("conv2", "bn2")),
    "Bottleneck": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
}
_LIBRARIES = ("torchvision.models.resnet", "timm.models.resnet")


def fuse_residual_blocks(module: nn.Module) -> nn.Module:
    """Turns ResNets' blocks and stems in `module` into their fused forms, in place; returns `module`.

    Only those with per-view batch norms (`split_statistics`). Blocks with something else between their layers (squeeze
    and excitation, stochastic depth, another activation) stay. A fused block that another one follows gives its result
    twice, as a pair: to the next one's convolution and to its shortcut.
    """
    for part in module.modules():
        if _is_block(part):
            part.__class__ = _fused(type(part))
        elif _is_resnet(part):
            _fuse_stem(part)
    for block, after in _pairs(module):
        block.forks = isinstance(block, _Fused) and isinstance(after, _Fused)
    return module


def _pairs(module):
    """Blocks of ResNets in `module` with the ones that follow them."""
    for part in module.modules():
        if _is_resnet(part) or isinstance(part, CifarResNet):
            # Stage after stage: what lies between two blocks hands on what it is given.
            yield from pairwise(
                [block for stage in part.children() if isinstance(stage, nn.Sequential) for block in stage]
            )


def fuse_pointwise(encoder: nn.Module, name: str) -> nn.Module:
    """Lets the fused bottlenecks in `encoder` take their last convolution in, in place; returns `encoder`.

    A block that another one of them follows gives its result as `Begun`: the next one's first convolution is done.
    `name`: of the encoder, for the `UserError` where it has no fused bottlenecks.
    """
    blocks = [
        block
        for block in encoder.modules()
        if isinstance(block, _Fused) and len(_layers(block)) == 3 and is_pointwise(block.conv3)
    ]
    if not blocks:
        raise UserError(
            f"model.fused_pointwise: {name} has no bottlenecks of 1x1 convolutions with batch norm per view; set "
            "false, or model.encoder=resnet50 with model.bn_statistics=per_view",
            "no-bottlenecks",
        )
    for block in blocks:
        block.is_pointwise = True
    for block, after in _pairs(encoder):
        if block in blocks and after in blocks and is_pointwise(after.conv1):
            # In a tuple, so that it is no part of this module.
            block.following = (after,)
    return encoder


def _is_resnet(module):
    return type(module).__name__ == "ResNet" and type(module).__module__ in _LIBRARIES


def _is_block(module):
    kind = type(module)
    if kind.__module__ not in _LIBRARIES or kind.__name__ not in _LAYERS:
        return False
    activations = [getattr(module, name) for name in ("relu", "act1", "act2", "act3") if hasattr(module, name)]
    # Each a module of timm's that this kind of ResNet does without, or an identity.
    between = [getattr(module, name, None) for name in ("drop_block", "aa", "se", "drop_path")]
    norms = [getattr(module, norm) for _, norm in _LAYERS[kind.__name__]]
    return (
        all(type(layer) is nn.ReLU for layer in activations)
        and all(layer is None or isinstance(layer, nn.Identity) for layer in between)
        and all(isinstance(layer, PerViewBatchNorm2d) for layer in norms)
        and (_is_identity(module.downsample) or _ends_with_norm(module.downsample))
    )


def _is_identity(shortcut):
    return shortcut is None or isinstance(shortcut, nn.Identity)


def _ends_with_norm(shortcut):
    return isinstance(shortcut, nn.Sequential) and isinstance(shortcut[-1], PerViewBatchNorm2d)


def _fuse_stem(resnet):
    """Its first norm takes the ReLU in, and its max pool the kernel."""
    activation = "relu" if hasattr(resnet, "relu") else "act1"
    if type(getattr(resnet, activation)) is nn.ReLU and isinstance(resnet.bn1, PerViewBatchNorm2d):
        setattr(resnet, activation, nn.Identity())
        resnet.bn1.then_relu = True
    pool = resnet.maxpool
    if type(pool) is nn.MaxPool2d and (pool.dilation, pool.ceil_mode, pool.return_indices) == (1, False, False):
        pool.__class__ = _MaxPool2d


class _MaxPool2d(nn.MaxPool2d):
    """By `kernels.max_pool`; its numbers are single ones, for height and width alike."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        return max_pool(images, self.kernel_size, self.stride, self.padding)


@functools.cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__})


class _Fused:
    """Mixin over a residual block."""

    forks = False
    """Whether the result is a pair of the same images twice, as the next block takes them."""

    is_pointwise = False
    """Whether the last convolution is part of the join."""

    following = ()
    """The next block, where its first convolution is a part of this one: then the result is `Begun`."""

    def forward(self, x):
        begun = x.inner if isinstance(x, Begun) else None
        x, carried = (x.carried,) * 2 if isinstance(x, Begun) else x if isinstance(x, tuple) else (x, x)
        layers = [(getattr(self, conv), getattr(self, norm)) for conv, norm in _layers(self)]
        shortcut = [] if _is_identity(self.downsample) else list(self.downsample)
        norms = [norm for _, norm in layers] + shortcut[-1:]
        if not takes_kernels(x, *norms):
            return super().forward(x)
        x = layers[0][0](x) if begun is None else begun
        for (_, norm), (convolution, _) in pairwise(layers):
            if self.is_pointwise and convolution is self.conv3 and takes_pointwise(x, *norms):
                return self._with_convolution(x, carried, shortcut)
            x = fused_convolution(norm, convolution, x)
        norm = layers[-1][1]
        if not shortcut:
            return fused_norm([norm], [x], carried, relu=True, forks=self.forks)
        for layer in shortcut[:-1]:
            carried = layer(carried)
        return fused_norm([norm, shortcut[-1]], [x, carried], relu=True, forks=self.forks)

    def _with_convolution(self, x, carried, shortcut):
        if shortcut:
            for layer in shortcut[:-1]:
                carried = layer(carried)
            carried = Shortcut(shortcut[-1], carried)
        following = self.following[0].conv1 if self.following else None
        return fused_pointwise(self.bn2, self.conv3, self.bn3, x, carried, forks=self.forks, following=following)


def _layers(block):
    return _LAYERS["Bottleneck" if hasattr(block, "conv3") else "BasicBlock"]
