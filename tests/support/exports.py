"""Exports made by the command, read back by the code that it prints."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

import fastsiam
from fastsiam.__main__ import main
from fastsiam.config import load_config
from fastsiam.models.encoder import build_encoder
from fastsiam.run.encoder_file import describe_encoder, save_encoder


def write_encoder(path: Path, name: str = "resnet18", *overrides: str) -> Path:
    """Write an encoder of r50_100ep.yaml with overrides, after step 7 of 8 images; kNN was 51.5 % after step 6."""
    config = load_config("r50_100ep", ["model.zero_init_residual=false", f"model.encoder={name}", *overrides])
    torch.manual_seed(0)
    model = config.model
    encoder = build_encoder(model.encoder, model.stem, model.width, model.zero_init_residual)
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values, low, high in ((layer.weight, 0.5, 1.5), (layer.running_var, 0.5, 2.0)):
                nn.init.uniform_(values, low, high)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
    save_encoder(encoder, describe_encoder(config, 7, "0" * 40, 56, 51.5, 6), path)
    return path


def images(batch=2, height=48, width=64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def features(model, given=None):
    with torch.no_grad():
        return model(images() if given is None else given)


def exported(folder, capsys, name, to, out, *overrides):
    """(encoder, variables that the printed code has set) after an export of a `write_encoder` into `folder`.

    detectron2's code, which sets a `cfg`, is not run.
    """
    path = write_encoder(folder / "encoder.safetensors", name, *overrides)
    assert main(["export", str(path), "--to", to, "--out", str(folder / out)]) == 0
    code, variables = capsys.readouterr().out.splitlines()[-1], {}
    if to != "detectron2":
        exec(code, variables)
    return fastsiam.load_encoder(path), variables


def described(path):
    """The description that a file carries, or the file beside it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["fastsiam"])
    return json.loads(path.with_name(f"{path.name}.json").read_text())["fastsiam"]
