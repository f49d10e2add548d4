"""What cannot be exported is one sentence, and nothing is written; what is unknown is said and left out."""

import errno
import importlib.util
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsiam.__main__ import main
from fastsiam.runtime import files
from tests.support.encoders import random_encoder
from tests.support.exports import write_encoder
from tests.support.refusals import refused

CIFAR_STEM = ("model.stem=cifar", "views.size=32")


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "overrides", "to", "out", "code"),
    [
        ("resnet18", CIFAR_STEM, "torchvision", "x.pth", "no-counterpart"),
        ("resnet18", CIFAR_STEM, "timm", "x", "no-counterpart"),
        ("resnet18", CIFAR_STEM, "detectron2", "x.pkl", "no-counterpart"),
        ("cifar_resnet8", ("model.width=8", *CIFAR_STEM), "torchvision", "x.pth", "no-counterpart"),
        ("cifar_resnet8", ("model.width=8", *CIFAR_STEM), "huggingface", "x", "no-counterpart"),
        ("resnet18", (), "torchvision", "nowhere/x.pth", "no-such-folder"),
        ("resnet18", (), "torchvision", "x.onnx", "other-suffix"),
        ("resnet18", (), "torchvision", "x", "other-suffix"),
        ("resnet18", (), "timm", "x.onnx", "other-suffix"),
        ("resnet18", (), "huggingface", "encoder.safetensors", "out-is-encoder"),
        ("resnet18", (), "safetensors", "encoder.safetensors", "out-is-encoder"),
        ("resnet18", (), "huggingface", ".", "folder-in-use"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, overrides, to, out, code):
    path = write_encoder(tmp_path / "encoder.safetensors", name, *overrides)
    error = refused("export", path, "--to", to, "--out", tmp_path / out)
    assert (error.code, error.key) == (code, "ENCODER" if code == "no-counterpart" else "--out")
    assert kept(tmp_path) == ["encoder.safetensors"]


def test_the_encoder_of_a_run_is_not_written_over(tmp_path):
    path = write_encoder(tmp_path / "encoder.safetensors")
    assert refused("export", tmp_path, "--to", "torchvision", "--out", path).code == "out-is-encoder"


def test_groups_and_widths_that_transformers_lacks_are_refused(tmp_path):
    path = write_encoder(tmp_path / "encoder.safetensors", "resnext50_32x4d")
    assert refused("export", path, "--to", "huggingface", "--out", tmp_path / "x").code == "no-counterpart"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = random_encoder(tmp_path / "encoder.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["blocks.1.conv2.weight"].view(-1)[3] = torch.nan
    save_file(state, path, metadata)
    error = refused("export", path, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
    assert error.code == "weights-not-finite"
    assert "1 of 2,304 values of blocks.1.conv2.weight" in str(error)
    assert kept(tmp_path) == ["encoder.safetensors"]


def test_a_missing_library_is_named_with_its_extra_before_anything_is_read(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    error = refused("export", tmp_path / "encoder.safetensors", "--to", "onnx", "--out", tmp_path / "x.onnx")
    assert (error.code, "'.[onnx]'" in str(error)) == ("no-onnxscript", True)


@pytest.mark.parametrize(("to", "out"), [("safetensors", "x.safetensors"), ("timm", "folder")])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, to, out):
    path = write_encoder(tmp_path / "encoder.safetensors")
    assert main(["export", str(path), "--to", to, "--out", str(tmp_path / out)]) == 0
    place = tmp_path / out / "model.safetensors" if to == "timm" else tmp_path / out
    before = kept(tmp_path), place.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert refused("export", path, "--to", to, "--out", tmp_path / out).code == "export-unwritten"
    assert (kept(tmp_path), place.read_bytes()) == before
    # An export of before is replaced.
    other = write_encoder(tmp_path / "encoder.safetensors", "resnet18", "views.size=160")
    assert main(["export", str(other), "--to", to, "--out", str(tmp_path / out)]) == 0
    with safe_open(place, "pt") as file:
        assert json.loads(file.metadata()["fastsiam"])["size"] == 160
    assert kept(tmp_path) == before[0]


@pytest.mark.parametrize(("to", "out"), [("huggingface", "x"), ("timm", "x"), ("detectron2", "x.pkl")])
def test_what_an_old_file_does_not_know_is_said_and_left_out(tmp_path, capsys, to, out):
    path = write_encoder(tmp_path / "encoder.safetensors")
    known = {"encoder": "resnet18", "stem": "imagenet", "width": None}
    save_file(load_file(path), path, {"fastsiam": json.dumps(known)})
    assert main(["export", str(path), "--to", to, "--out", str(tmp_path / out)]) == 0
    assert "does not say its mean, std, size, crop_ratio, interpolation" in capsys.readouterr().err
    if to == "huggingface":
        assert kept(tmp_path / out) == ["config.json", "model.safetensors"]
    elif to == "timm":
        config = json.loads((tmp_path / "x/config.json").read_text())["pretrained_cfg"]
        assert not {"mean", "std", "interpolation", "crop_pct", "input_size"} & config.keys()
    else:
        terms = json.loads((tmp_path / "x.pkl.json").read_text())["merge_from_list"]
        assert not {"MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"} & set(map(str, terms))
