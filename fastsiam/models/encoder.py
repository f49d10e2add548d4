"""Backbones: torchvision's and timm's classifiers without their heads, and the CIFAR ResNets of He et al."""

import difflib
import itertools
import math

import torch
import torchvision
from torch import nn

from fastsiam.config.encoder_names import OWN, TIMM, TORCHVISION_RESNETS
from fastsiam.errors import MissingLibraryError, UserError


def build_encoder(name: str, stem: str, width: int | None, zero_init_residual: bool) -> nn.Module:
    """An encoder from images [B, 3, S, S] to pooled features [B, D]; `num_features` is D.

    `name`: torchvision's (`resnet50`), `timm:NAME`, or `cifar_resnetN` with N = 6n+2 and `width` channels in its first
    stage. `stem`: `imagenet`, or `cifar` for a ResNet with a 3x3 convolution of stride 1 and no pooling (paper,
    appendix D). `zero_init_residual`: the last batch norm of a ResNet's block starts at zero (Goyal et al. 2017).
    Names of parameters are those of the library. Raises `UserError` for what timm does not know.
    """
    if name.startswith(OWN):
        return CifarResNet(int(name.removeprefix(OWN)), width, zero_init_residual)
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), zero_init_residual)
    if name not in TORCHVISION_RESNETS:
        return _without_head(_of_torchvision(name))
    encoder = getattr(torchvision.models, name)(weights=None, zero_init_residual=zero_init_residual)
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return _without_head(encoder)


def build_on_meta(name: str, stem: str, width: int | None, zero_init_residual: bool = False) -> nn.Module:
    """The encoder without its weights: names, shapes, and a forward of tensors on the device meta."""
    try:
        with torch.device("meta"):
            return build_encoder(name, stem, width, zero_init_residual)
    except (NotImplementedError, RuntimeError):
        # Some, like torchvision's RegNets, compute their widths with tensors.
        with torch.random.fork_rng(devices=[]):
            return build_encoder(name, stem, width, zero_init_residual).to("meta")


def check_sizes(encoder: nn.Module, name: str, sizes: list[int]) -> None:
    """Raise `UserError` where an encoder on meta does not give [B, num_features] of views of `sizes` pixels.

    An encoder that takes only one size, like a vision transformer, is refused here and not where views grow.
    """
    for size in sizes:
        reason = _refusal(encoder, size)
        if reason is None:
            continue
        native = _native_size(encoder)
        fits = [other for other in (native, 224) if other and other != size and _refusal(encoder, other) is None]
        cure = f"set views.size={fits[0]}" if fits else "set another views.size"
        if fits and len(sizes) > 1:
            cure += " without another size beside it"
        raise UserError(f"views.size: {name} takes no views of {size} px ({reason}); {cure}", "size-of-encoder")


def _refusal(encoder, size):
    try:
        # Two images: batch norm over one value a channel is an error of the batch size.
        out = encoder.train()(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, ZeroDivisionError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(".")
    if not isinstance(out, torch.Tensor) or tuple(out.shape) != (2, encoder.num_features):
        return f"its output is {list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}"
    return None


def _native_size(encoder):
    config = getattr(encoder, "pretrained_cfg", None) or {}
    return getattr(encoder, "image_size", None) or config.get("input_size", (None,))[-1]


def _of_torchvision(name):
    build = getattr(torchvision.models, name)
    # Without auxiliary classifiers; and with the random weights that their authors chose, which torchvision has begun
    # to warn of.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return build(weights=None, **options)


def _without_head(model: nn.Module) -> nn.Module:
    """A classifier of torchvision that ends with its pooled features; what it normalises them by stays."""
    place = next(place for place in ("fc", "classifier", "heads", "head") if hasattr(model, place))
    head = getattr(model, place)
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    # The first layer with weights is the classifier's, or that of a perceptron in front of it.
    kept = list(itertools.takewhile(lambda layer: not isinstance(layer, nn.Linear | nn.Conv2d | nn.Dropout), layers))
    first = next(layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))
    if isinstance(first, nn.Conv2d):
        # SqueezeNet pools the scores of its classes.
        model.num_features, kept = first.in_channels, [nn.AdaptiveAvgPool2d(1)]
    else:
        pooled = getattr(getattr(model, "avgpool", None), "output_size", 1)
        places = math.prod(pooled) if isinstance(pooled, tuple) else pooled**2
        model.num_features = first.in_features // places
        if places > 1:
            # AlexNet and VGG flatten 6x6 and 7x7 places.
            model.avgpool = nn.AdaptiveAvgPool2d(1)
    setattr(model, place, nn.Sequential(*kept) if kept else nn.Identity())
    if isinstance(getattr(model, "dropout", None), nn.Dropout):
        model.dropout = nn.Identity()
    return model


def import_timm(key: str):
    """The module timm; raises `MissingLibraryError` of the config's `key` where it cannot be imported."""
    try:
        import timm
    except ImportError as error:
        raise MissingLibraryError(
            f"{key}: timm cannot be imported ({error}); pip install -e '.[timm]' (or pip install timm), or set another "
            f"{key}",
            "no-timm",
            name=error.name or "timm",
        ) from error
    return timm


def _of_timm(name, zero_init_residual):
    timm = import_timm("model.encoder")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1, 0.3)
        hint = f"; did you mean {TIMM}{near[0]}?" if near else ""
        raise UserError(f"model.encoder: timm {timm.__version__} has no model {name}{hint}", "unknown-encoder")
    options = {}
    if timm.models.model_entrypoint(name).__module__ == "timm.models.resnet":
        # Their default is true.
        options = {"zero_init_last": zero_init_residual}
    elif zero_init_residual:
        raise UserError(
            f"model.zero_init_residual: true is for ResNets; set model.zero_init_residual=false for {TIMM}{name}",
            "zero-init-of-resnets",
        )
    encoder = timm.create_model(name, pretrained=False, num_classes=0, **options)
    # Some have a layer behind their pooling, whose width it is.
    encoder.num_features = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return encoder


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: a 3x3 stem, three stages of n basic blocks at 32, 16 and 8 px, mean pooling.

    Shortcuts that change the width are 1x1 convolutions (their option B; their CIFAR nets pad with zeros).
    """

    def __init__(self, depth: int, width: int, zero_init_residual: bool):
        super().__init__()
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                out = width << stage
                stride = 2 if stage and not block else 1
                shortcut = (
                    nn.Identity()
                    if channels == out
                    else torchvision.ops.misc.Conv2dNormActivation(channels, out, 1, stride, activation_layer=None)
                )
                blocks.append(torchvision.models.resnet.BasicBlock(channels, out, stride, shortcut))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for block in self.blocks:
                nn.init.zeros_(block.bn2.weight)

    def forward(self, x):
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        return x.mean((2, 3))
