"""timm: weights in its names, with a pretrained_cfg: without one it crops and resizes otherwise (0.95, bicubic)."""

import json
from pathlib import Path

from torch import nn

from fastsiam.export.feeding import Feeding
from fastsiam.export.output import as_json, put_file, put_folder, put_sidecar, sidecar, state_bytes
from fastsiam.export.resnet import resnet_name

# What timm's own configuration of an architecture says of it, and not of the weights that come with it.
_OF_ARCHITECTURE = ("classifier", "first_conv", "fixed_input_size")


def write(encoder: nn.Module, out: Path) -> str:
    """Writes a file with a sidecar, or where `out` has no suffix a folder; returns the code that loads it."""
    name = encoder.description["encoder"].removeprefix("timm:")
    if not encoder.description["encoder"].startswith("timm:"):
        name = resnet_name(encoder, "timm")
    config = _pretrained_config(encoder)
    if not out.suffix or out.is_dir():
        said = {"architecture": name, "num_classes": 0, "num_features": encoder.num_features, "pretrained_cfg": config}
        files = {"config.json": as_json(said | {"fastsiam": encoder.description})}
        put_folder(out, files | {"model.safetensors": state_bytes(encoder, ".safetensors")})
        return f"import timm; model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True).eval()"
    read = f"json.load(open({str(sidecar(out))!r}))['pretrained_cfg']"
    given = f"pretrained=True, num_classes=0, pretrained_cfg=dict({read}, file={str(out)!r})"
    code = f"import json, timm; model = timm.create_model({name!r}, {given}).eval()"
    put_sidecar(out, encoder, code, {"architecture": name, "pretrained_cfg": config})
    put_file(out, state_bytes(encoder, out.suffix))
    return code


def _pretrained_config(encoder):
    """timm's PretrainedCfg; numbers of the test size are given too, or those of timm's own weights would stay."""
    feeding = Feeding.of(encoder)
    own = getattr(encoder, "pretrained_cfg", None) or {"classifier": "fc", "first_conv": "conv1"}
    size = feeding.size and [3, feeding.size, feeding.size]
    found = {
        "input_size": size,
        "test_input_size": size,
        "interpolation": feeding.interpolation,
        "crop_pct": feeding.crop_ratio,
        "test_crop_pct": feeding.crop_ratio,
        "crop_mode": feeding.crop_ratio and "center",
        "mean": feeding.mean,
        "std": feeding.std,
        "description": json.dumps(encoder.description),
    }
    found = {key: value for key, value in found.items() if value is not None}
    return {"num_classes": 0, **{key: own[key] for key in _OF_ARCHITECTURE if key in own}, **found}
