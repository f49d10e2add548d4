"""What a detector was made of: asserted, and printed before its training."""

from collections import Counter

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fastsiam.evaluate.detection.models import STAGES

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def check_detector(model: nn.Module, weights: dict[str, torch.Tensor], freeze: str) -> dict:
    """Numbers of tensors that were loaded, are trained and are frozen, and of batch norms by kind.

    `weights`: the encoder's state dict. Raises `AssertionError` where one of its tensors is not in the detector with
    its value, where others than those of the stages up to `freeze` are not trained, and for norms of another kind.
    """
    state, parameters = model.state_dict(), dict(model.named_parameters())
    held = STAGES[: STAGES.index(freeze) + 1] if freeze != "none" else ()
    names = {name: _place(name, state) for name in weights}
    # A frozen norm does not count its batches.
    names = {name: place for name, place in names.items() if place in state or _stage(name) not in held}
    other = [name for name, place in names.items() if not torch.equal(state[place].cpu(), weights[name].cpu())]
    assert not other, f"the detector has other values than the encoder in {other[:3]}"
    expected = {place for name, place in names.items() if _stage(name) in held and place in parameters}
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    assert frozen == expected, f"frozen are {len(frozen)} tensors, not {len(expected)}"
    norms = [module for module in model.modules() if type(module).__name__.endswith(("Norm", "Norm2d"))]
    assert {type(module) for module in norms} <= set(_NORMS), {type(module).__name__ for module in norms}
    return {
        "loaded_tensors": len(names),
        "trained_tensors": len(parameters) - len(frozen),
        "frozen_tensors": len(frozen),
        "norms": dict(Counter(type(module).__name__ for module in norms)),
    }


def _place(name, state):
    """The name in the detector of a tensor of the encoder."""
    if "backbone.body.conv1.weight" in state:
        return f"backbone.body.{name}"
    return f"roi_heads.box_head.{name}" if name.startswith("layer4") else f"backbone.{name}"


def _stage(name):
    first = name.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first
