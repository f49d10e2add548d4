"""Names that model.encoder takes, known without importing torch, and the keys that go with each."""

import difflib
import re

from fastsiam.config.yaml_file import shown
from fastsiam.errors import UserError

TORCHVISION_RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
TORCHVISION_OTHERS = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s",
    "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf",
    "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
    "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
)  # fmt: skip
TORCHVISION = (*TORCHVISION_RESNETS, *TORCHVISION_OTHERS)
TIMM = "timm:"
OWN = "cifar_resnet"


def check_name(name: str) -> None:
    """Raises `UserError` for a name that is no encoder, with the nearest one; timm's own names are checked at start."""
    if name.startswith(TIMM):
        _check_timm(name)
        return
    match = re.fullmatch(rf"{OWN}(\d+)", name)
    if name in TORCHVISION or (match and int(match[1]) >= 8 and (int(match[1]) - 2) % 6 == 0):
        return
    near = difflib.get_close_matches(name, [*TORCHVISION, f"{OWN}8", f"{OWN}20"], 1, 0.3)
    raise UserError(
        f"model.encoder: {shown(name)} is neither a torchvision classifier, cifar_resnetN with N = 8, 14, 20, ... nor "
        "timm:NAME" + (f"; did you mean {near[0]}?" if near else ""),
        "unknown-encoder",
    )


def _check_timm(name):
    architecture, dot, _ = name.removeprefix(TIMM).partition(".")
    if not re.fullmatch(r"[A-Za-z0-9_]+", architecture):
        raise UserError(
            f"model.encoder: {shown(name)} names no model of timm; write for example timm:resnet50", "unknown-encoder"
        )
    if dot:
        raise UserError(
            f"model.encoder: {shown(name)} names weights; set model.encoder=timm:{architecture} and, to start from "
            f"them, model.weights={name}",
            "weights-as-encoder",
        )


def check_bottlenecks(name: str) -> None:
    """Raises `UserError` for an encoder that has no bottlenecks; which of timm's have them, timm says."""
    if name not in TORCHVISION_RESNETS[2:] and not name.startswith(TIMM):
        raise UserError(
            f"model.fused_pointwise: {name} has no bottlenecks, whose 1x1 convolutions it is for; set "
            "model.fused_pointwise=false, or model.encoder=resnet50",
            "no-bottlenecks",
        )


def check_options(name: str, stem: str, width: int | None, zero_init_residual: bool) -> None:
    """Raises `UserError` where an encoder has no such stem, width or residual blocks."""
    if name.startswith(OWN):
        if stem != "cifar" or width is None:
            raise UserError(f"model.encoder: {name} needs model.stem=cifar and a model.width", "no-width")
        return
    if width is not None:
        raise UserError(f"model.width: only cifar_resnetN has a width to choose; set null for {name}", "width-is-fixed")
    if name in TORCHVISION_RESNETS:
        return
    if stem == "cifar":
        raise UserError(
            f"model.stem: cifar is a stem of torchvision's ResNets; set model.stem=imagenet, which leaves {name} as it "
            "is",
            "stem-of-resnets",
        )
    # Which of timm's are ResNets, timm says.
    if zero_init_residual and not name.startswith(TIMM):
        raise UserError(
            f"model.zero_init_residual: true is for ResNets; set model.zero_init_residual=false for {name}",
            "zero-init-of-resnets",
        )
