"""Every method with small heads, on an encoder of one convolution, and its training steps."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from fastsiam.config import load_config
from fastsiam.runtime.distributed import World
from tests.support.gloo_ranks import world as world_of_group
from tests.support.steps import build_step

IMAGES = 24
NO_LAST_NORM = "method.projector={layers: 2, hidden: 16, out: 8, norm: hidden}"
_PREDICTOR = "method.predictor={hidden: 8, norm: hidden}"
_TWO_SIZES = (
    "views=[{recipe: demo, size: 8, color: matrix, count: 2}, {recipe: demo, size: 4, color: matrix, count: 3}]"
)
_SWAV = ("method.name=swav", NO_LAST_NORM, "method.prototypes=12", "method.freeze_prototypes=0.1")

METHODS = {
    "simsiam": ("method.name=simsiam", _PREDICTOR),
    "asymmetric": ("method.name=simsiam", _PREDICTOR, "method.symmetric=false", "views.count=4"),
    "cross entropy": ("method.name=simsiam", _PREDICTOR, "method.similarity=cross_entropy"),
    "fastsiam": ("method.name=simsiam", _PREDICTOR, "method.target_views=2", "views.count=4"),
    "alternating": ("method.name=simsiam_alternating", _PREDICTOR, "method.steps=3"),
    "average": ("method.name=simsiam_average", f"method.images={IMAGES}"),
    "byol": ("method.name=byol", NO_LAST_NORM, _PREDICTOR, "method.momentum=0.9"),
    "simclr": ("method.name=simclr", NO_LAST_NORM, "views.count=3"),
    "simclr with a predictor": ("method.name=simclr", NO_LAST_NORM, _PREDICTOR),
    "simclr, keys held": ("method.name=simclr", NO_LAST_NORM, _PREDICTOR, "method.stop_gradient=true"),
    "moco": ("method.name=moco", NO_LAST_NORM, "method.queue=24", "method.momentum=0.9"),
    "moco, symmetric": (
        "method.name=moco", NO_LAST_NORM, "method.queue=48", "method.momentum=0.9", "method.symmetric=true",
    ),
    "swav": (*_SWAV, "method.queue=20", "method.queue_from=0.3", _TWO_SIZES, "model.bn_statistics=joint"),
    "swav, two views": (*_SWAV, "method.queue=20", "method.queue_from=0.3"),
    "swav, codes not held": (*_SWAV, _PREDICTOR, "method.stop_gradient=false", "method.queue=24"),
}  # fmt: skip
# One of each class, for what does not depend on variants.
CLASSES = ("simsiam", "alternating", "average", "byol", "simclr", "moco", "swav")


def _heads(name):
    has_own = any("projector" in override for override in METHODS[name])
    return () if has_own else ("method.projector={layers: 2, hidden: 16, out: 8}",)


def run_overrides(tiny, name, *more):
    """Overrides of a run of one of METHODS on the 80 demo images of the fixture `tiny`."""
    common = [override for override in tiny() if not override.startswith("method.")]
    images = ("method.images=80",) if name == "average" else ()
    return [*common, *_heads(name), *METHODS[name], *images, *more]


def small_config(name, *more):
    """Config of one of METHODS: batches of 8 images of 8 px."""
    common = ("views.size=8", "train.batch_size=8", "train.device=cpu", "train.precision=fp32", "optimizer.base_lr=3")
    return load_config("quickstart", [*common, *_heads(name), *METHODS[name], *more])


class OneConvolution(nn.Sequential):
    """Encoder without a ReLU, whose kink makes of a rounding error another gradient."""

    num_features = 8

    def __init__(self, *_):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


@contextlib.contextmanager
def one_convolution():
    """`build_method` builds methods on `OneConvolution` inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsiam.methods.build_encoder", OneConvolution)
        yield


def small_step(config, dtype=torch.float64, world=None, compiles=False):
    with one_convolution():
        return build_step(config, dtype, world, compiles)


def views_of(config, number, dtype=torch.float64):
    """Groups [V_g*N, 3, S_g, S_g] of the batch of step `number`: views of an image resemble each other."""
    generator, images = torch.Generator().manual_seed(number), config.train.batch_size
    base = torch.randn(1, images, 3, 1, 1, generator=generator, dtype=torch.float64)
    groups = []
    for count, spec in config.view_groups:
        noise = torch.randn(count, images, 3, spec.size, spec.size, generator=generator, dtype=torch.float64)
        views = (base + noise * (1 + torch.arange(count).view(-1, 1, 1, 1, 1))).flatten(0, 1)
        groups.append(views.to(dtype, memory_format=torch.channels_last))
    return groups


def call_view_by_view(networks):
    """Batch norms inside of `networks` take one view at a time from now on."""
    for layer in networks.modules():
        if hasattr(layer, "num_views"):
            layer.num_views = 1


def indices_of(config, number):
    """[N] of the images of step `number`, which come again in other steps."""
    return np.random.default_rng(number).permutation(IMAGES)[: config.train.batch_size]


def shard(views, count, world):
    """This rank's images of a group of `count` views."""
    return views.unflatten(0, (count, -1)).chunk(world.size, 1)[world.rank].flatten(0, 1)


def trained(config, steps, dtype=torch.float64, compiles=False):
    """Losses, and the method's state dict, of `steps` steps on the images of this rank."""
    world = world_of_group() if torch.distributed.is_initialized() else World()
    step, losses = small_step(config, dtype, world, compiles), []
    for number in range(steps):
        groups = zip(views_of(config, number, dtype), config.view_groups, strict=True)
        views = [shard(group, count, world) for group, (count, _) in groups]
        indices = indices_of(config, number).reshape(world.size, -1)[world.rank]
        losses.append(step(views, number + 1, indices, number / steps)["loss"].item())
    return losses, step.method.state_dict()
