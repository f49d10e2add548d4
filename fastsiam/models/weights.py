"""Weights of an encoder among the tensors of any file: the prefix they lie under is found, and names are matched.

Functions of a state dict and a module; nothing is read from the disk.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from fastsiam.config.encoder_names import TORCHVISION, TORCHVISION_RESNETS
from fastsiam.models.encoder import build_on_meta

# A module of torch.compile stands in the names as well.
_COMPILED = "_orig_mod."
# Words of a prefix whose network follows another one: MoCo's encoder_k, solo-learn's momentum_backbone, BYOL's target.
_FOLLOWERS = {"momentum", "ema", "target", "k", "key", "m", "avg", "averaged"}
# torchvision's ResNets as nn.Sequential(*list(resnet.children())[:-1]), the form of lightly's examples.
_NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
# Modules that end in the classifier, of which an encoder may keep the beginning.
_HEADS = {"classifier", "head", "heads", "fc"}
# Fewer tensors than any network has that `look_alike` knows.
_FEW = 10
# Parts of names that a family's networks have, so that not all of them need to be built; others have features.0.
_MARKS = {
    "resne": ("layer1.0.conv1.", "4.0.conv1."), "wide_resne": ("layer1.0.conv1.", "4.0.conv1."),
    "regnet": ("trunk_output.",), "densenet": ("denseblock1.",), "googlenet": ("inception3a.",),
    "inception": ("Mixed_5b.",), "shufflenet": ("stage2.0.",), "mnasnet": ("layers.0.",),
    "vit": ("encoder_layer_0.",), "maxvit": ("blocks.0.layers.",),
}  # fmt: skip


class Match(NamedTuple):
    """What a file holds of an encoder."""

    prefix: str
    """Before the names of the encoder's tensors in the file, with its last dot; may be empty."""
    state: dict[str, torch.Tensor]
    """Tensors of the right shapes, by their names in the encoder."""
    missing: list[str]
    """Names in the encoder that the file does not have; a missing `num_batches_tracked` is none."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Shapes in the file and in the encoder, by name, where they differ."""
    dropped: list[str]
    """Names below the prefix that the encoder does not have: a classifier or projector."""
    elsewhere: int
    """Number of tensors under other prefixes."""
    rivals: list[str]
    """Other prefixes under which as much fits."""
    needed: int
    """Number of the encoder's tensors, those of `num_batches_tracked` left out."""

    @property
    def deeper(self) -> list[str]:
        """Those of `dropped` that are layers of a larger network: ResNet-34's tensors hold all of ResNet-18's."""
        # A module of more than vectors that is no classifier.
        body = {name.partition(".")[0] for name, value in self.state.items() if value.ndim > 1 and name.count(".") > 1}
        return [name for name in self.dropped if name.partition(".")[0] in body - _HEADS]

    @property
    def matched(self) -> int:
        """Number of the encoder's tensors that the file holds in their shape, out of `needed`."""
        return self.needed - len(self.missing) - len(self.mismatched)


def flatten(contents: object) -> dict[str, torch.Tensor]:
    """All tensors in nested dicts by their dotted names, those of optimizers left out; empty for anything else."""
    found: dict[str, torch.Tensor] = {}

    def walk(node, prefix):
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, torch.Tensor):
                found[name.replace(_COMPILED, "")] = value.detach()
            elif isinstance(value, Mapping) and not str(key).startswith("optimizer"):
                walk(value, f"{name}.")

    if isinstance(contents, Mapping):
        walk(contents, "")
    return found


def find(tensors: Mapping[str, torch.Tensor], encoder: nn.Module) -> Match:
    """The weights of `encoder` among `tensors`, under the prefix where most of them have the right names and shapes.

    Of prefixes with at least half as many as the best one, the order is: a `teacher` (DINO evaluates it), then networks
    that are trained, then those that follow another by momentum (`encoder_k`, `momentum_backbone`, `ema`, `target`);
    among equals the one with more tensors, the shorter one, the first in the alphabet. Works on the device meta.
    """
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    tables = [{name: name for name in shapes}, _numbered(shapes)]
    ranked = [_ranked(tensors, {theirs: shapes[ours] for theirs, ours in table.items()}) for table in tables]
    which = max(range(len(tables)), key=lambda number: max((score for score, _ in ranked[number]), default=(0, 0)))
    table, order = tables[which], ranked[which]
    (best, prefix) = order[0] if order else ((0, 0), "")
    return _matched(tensors, prefix, table, shapes, [other for score, other in order[1:] if score == best])


def _numbered(shapes):
    """Names by numbers to names of the encoder, where it is made of the parts of torchvision's ResNets."""
    if {name.partition(".")[0] for name in shapes} != _NUMBERED.keys():
        return {}
    return {f"{_NUMBERED[(parts := name.partition('.'))[0]]}.{parts[2]}": name for name in shapes}


def _ranked(tensors, shapes):
    """[((right shapes, right names), prefix)] in the order of `find`."""
    right, named = Counter(), Counter()
    for key, value in tensors.items():
        parts = key.split(".")
        for start in range(len(parts)):
            shape = shapes.get(".".join(parts[start:]))
            if shape is not None:
                prefix = "".join(f"{part}." for part in parts[:start])
                named[prefix] += 1
                right[prefix] += shape == tuple(value.shape)
    most = max(right.values(), default=0)
    found = [((right[prefix], named[prefix]), prefix) for prefix in named if 2 * right[prefix] >= most]
    return sorted(found, key=lambda one: (_standing(one[1]), -one[0][0], -one[0][1], len(one[1]), one[1]))


def _standing(prefix):
    words = set(prefix.replace(".", "_").split("_"))
    return 0 if "teacher" in words else 2 if words & _FOLLOWERS else 1


def _matched(tensors, prefix, table, shapes, rivals):
    state, mismatched, missing, used = {}, {}, [], set()
    for theirs, ours in table.items():
        value = tensors.get(prefix + theirs)
        if value is None:
            missing.append(ours)
            continue
        used.add(prefix + theirs)
        if tuple(value.shape) == shapes[ours]:
            state[ours] = value
        else:
            mismatched[ours] = tuple(value.shape), shapes[ours]
    counted = [name for name in shapes if not _is_counter(name)]
    below = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix) and name not in used]
    return Match(
        prefix=prefix,
        state=state,
        missing=[name for name in missing if not _is_counter(name)],
        mismatched={name: both for name, both in mismatched.items() if not _is_counter(name)},
        dropped=below,
        elsewhere=len(tensors) - len(used) - len(below),
        rivals=rivals,
        needed=len(counted),
    )


def _is_counter(name):
    return name.endswith("num_batches_tracked")


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that hold a NaN or an infinity."""
    return [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def look_alike(tensors: Mapping[str, torch.Tensor], arch: object = None) -> tuple[str, str] | None:
    """(encoder, stem) of the torchvision network whose weights a file holds in full; None where it is none.

    `arch`: its name, where the file says it; it is believed as far as the tensors have its shapes.
    """
    if len(tensors) < _FEW:
        return None
    said = [arch] if isinstance(arch, str) and arch in TORCHVISION else []
    for name in dict.fromkeys((*said, *TORCHVISION)):
        marks = next((marks for family, marks in _MARKS.items() if name.startswith(family)), ("features.0.",))
        if not any(mark in tensor for tensor in tensors for mark in marks):
            continue
        for stem in ("imagenet", "cifar") if name in TORCHVISION_RESNETS else ("imagenet",):
            found = find(tensors, build_on_meta(name, stem, None))
            # A network may hold a smaller one of the same names: VGG-13 the first layers of VGG-11.
            if found.matched == found.needed and not found.deeper:
                return name, stem
    return None
