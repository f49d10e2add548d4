"""Torchvision's ResNets: which encoders are one, their numbers, and the parts that their names of weights speak of."""

import re
from typing import NamedTuple

import torchvision
from torch import nn

from fastsiam.errors import UserError

_RESNETS = re.compile(r"(wide_)?resnex?t\d+\w*")
_LAYER = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([1-3])|downsample\.([01]))\.(\w+)")


class Part(NamedTuple):
    """What a weight of a ResNet belongs to."""

    stage: int | None
    """1 to 4; None for the stem."""
    block: int | None
    convolution: int | None
    """1 to 3 in a block; None for its shortcut, and for the stem."""
    is_norm: bool
    tensor: str
    """weight, bias, running_mean, running_var or num_batches_tracked."""


class Shape(NamedTuple):
    """Numbers of a ResNet: He et al. 2016, table 1, and Xie et al. 2017 for groups."""

    depths: list[int]
    is_bottleneck: bool
    widths: list[int]
    """Channels that each stage gives."""
    groups: int
    width_per_group: int

    @property
    def layers(self) -> int:
        """Its name's number: 50."""
        return 2 + sum(self.depths) * (3 if self.is_bottleneck else 2)


def is_resnet(name: str) -> bool:
    return bool(_RESNETS.fullmatch(name)) and hasattr(torchvision.models, name)


def resnet_name(encoder: nn.Module, to: str) -> str:
    """Torchvision's name of an encoder that is one of its ResNets; timm's of the same name are the same networks.

    Raises `UserError` for any other encoder: `to` has no counterpart.
    """
    description = encoder.description
    name = description["encoder"].removeprefix("timm:")
    if not is_resnet(name):
        raise UserError(
            f"ENCODER: {to} has no counterpart of {description['encoder']}; {others(description)}", "no-counterpart"
        )
    if description["stem"] != "imagenet":
        raise UserError(
            f"ENCODER: {to} has no {name} with a 3x3 first layer (model.stem={description['stem']}); "
            f"{others(description)}",
            "no-counterpart",
        )
    return name


def others(description: dict) -> str:
    """Formats that take any encoder, and the library that an encoder comes from, as the end of a sentence."""
    name = description["encoder"]
    library = "" if name.startswith("cifar_resnet") or description["stem"] != "imagenet" else "torchvision, "
    return f"--to {'timm, ' if name.startswith('timm:') else library}onnx or safetensors writes it"


def shape(encoder: nn.Module) -> Shape:
    """Of an encoder that `resnet_name` takes."""
    stages = [getattr(encoder, f"layer{stage}") for stage in range(1, 5)]
    first = stages[0][0]
    is_bottleneck = hasattr(first, "conv3")
    last = "conv3" if is_bottleneck else "conv2"
    widths = [getattr(stage[0], last).out_channels for stage in stages]
    groups = first.conv2.groups
    return Shape([len(stage) for stage in stages], is_bottleneck, widths, groups, first.conv2.out_channels // groups)


def part_of(name: str) -> Part:
    """The part that torchvision names so: `layer1.0.bn2.bias` is (1, 0, 2, True, "bias")."""
    module, _, tensor = name.rpartition(".")
    if module in ("conv1", "bn1"):
        return Part(None, None, None, module == "bn1", tensor)
    stage, block, kind, number, place, tensor = _LAYER.fullmatch(name).groups()
    is_norm = kind == "bn" or place == "1"
    return Part(int(stage), int(block), int(number) if number else None, is_norm, tensor)
