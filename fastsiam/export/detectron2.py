"""detectron2: a pickle of arrays in the names of its ResNets, as its own R-50.pkl; detectron2 is not needed for it."""

import io
import pickle
from pathlib import Path

import numpy as np
from torch import nn

from fastsiam.export.feeding import Feeding, weights
from fastsiam.export.output import put_file, put_sidecar, sidecar
from fastsiam.export.resnet import Part, part_of, resnet_name, shape


def write(encoder: nn.Module, out: Path) -> str:
    """Writes the pickle and a sidecar of the keys of detectron2's config; returns the code that sets them in `cfg`."""
    resnet_name(encoder, "detectron2")
    state = {detectron2_name(part_of(name)): value.numpy() for name, value in weights(encoder).items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    keys = f"json.load(open({str(sidecar(out))!r}))['merge_from_list']"
    code = f"import json; cfg.merge_from_list({keys} + ['MODEL.WEIGHTS', {str(out)!r}])"
    put_sidecar(out, encoder, code, {"merge_from_list": config_keys(encoder)})
    contents = {"model": state, "__author__": "fastsiam", "matching_heuristics": True, "fastsiam": encoder.description}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(contents)
    put_file(out, buffer.getvalue())
    return code


def detectron2_name(part: Part) -> str:
    """`res2.0.conv1.norm.weight` for torchvision's `layer1.0.bn1.weight`."""
    if part.stage is None:
        module = "stem.conv1"
    else:
        inner = f"conv{part.convolution}" if part.convolution else "shortcut"
        module = f"res{part.stage + 1}.{part.block}.{inner}"
    return f"{module}{'.norm' if part.is_norm else ''}.{part.tensor}"


def config_keys(encoder):
    """Keys and values in turn, as merge_from_list takes them; pixels there are in [0, 255]."""
    numbers, feeding = shape(encoder), Feeding.of(encoder)
    found = {
        "MODEL.RESNETS.DEPTH": numbers.layers,
        "MODEL.RESNETS.NUM_GROUPS": numbers.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": numbers.width_per_group,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": numbers.widths[0],
        # Torchvision's stride is in the 3x3 convolution; detectron2's default is that of the original ResNet.
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "INPUT.FORMAT": "RGB",
    }
    if feeding.mean and feeding.std:
        found["MODEL.PIXEL_MEAN"] = [round(255 * value, 6) for value in feeding.mean]
        found["MODEL.PIXEL_STD"] = [round(255 * value, 6) for value in feeding.std]
    return [term for pair in found.items() for term in pair]


class _Pickler(pickle.Pickler):
    """Writes an array as a call of numpy.ndarray: numpy's own way names a module that older versions do not have."""

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented
