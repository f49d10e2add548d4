"""An encoder can be had from every run, says how to feed it, and a file of another kind is one sentence."""

import hashlib
import json
import os
import signal
import stat

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastsiam
from fastsiam.config import load_config
from fastsiam.config.views import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD
from fastsiam.methods import build_method
from fastsiam.models.encoder import build_encoder
from fastsiam.run.encoder_file import describe_encoder, load_encoder, save_encoder
from fastsiam.runtime import files
from fastsiam.train import main
from tests.support.refusals import refuses
from tests.support.runs import of_an_earlier_version, start, wait_for_step


def images(count=8, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def assert_weights(encoder, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["method"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"])


def test_a_saved_encoder_loads_with_identical_features(tiny_config, tmp_path):
    config = tiny_config()
    method = build_method(config).to(memory_format=torch.channels_last)
    method([images()])
    save_encoder(method.encoder, describe_encoder(config, 7, None), tmp_path / "encoder.safetensors")
    expected = method.encoder.eval()(images())
    assert expected.std() > 0.01
    for where in (tmp_path, tmp_path / "encoder.safetensors", str(tmp_path)):
        loaded = load_encoder(where)
        assert not loaded.training
        assert loaded.num_features == 32
        torch.testing.assert_close(loaded(images()), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(loaded.state_dict(), method.encoder.state_dict(), atol=0, rtol=0)


def test_torchvision_loads_a_saved_resnet50(tmp_path):
    config = load_config("r50_100ep", ["model.zero_init_residual=false"])
    encoder = build_encoder("resnet50", "imagenet", None, False)
    encoder(images(2, 32))
    save_encoder(encoder, describe_encoder(config, 1, None), tmp_path / "encoder.safetensors")
    theirs = torchvision.models.resnet50()
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert unexpected == []
    theirs.fc = nn.Identity()
    assert (theirs.eval()(images(2, 32)) == encoder.eval()(images(2, 32))).all()


def test_a_run_says_in_its_encoder_how_to_feed_it(tiny, tmp_path):
    result = fastsiam.pretrain(load_config("quickstart", tiny("train.max_steps=3", "data.val=null")))
    with safe_open(tmp_path / "runs/run/encoder.safetensors", "pt") as file:
        said = json.loads(file.metadata()["fastsiam"])
    expected = {
        "encoder": "cifar_resnet8", "stem": "cifar", "width": 8, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
        "size": 16, "crop_ratio": 1.0, "interpolation": "bilinear", "recipe": "demo", "method": "simsiam", "step": 3,
        "images_seen": 24, "average": "none", "knn": None, "knn_step": None, "knn_k": None, "knn_temperature": None,
        "fastsiam": fastsiam.__version__,
    }  # fmt: skip
    expected["config"] = hashlib.sha256((tmp_path / "runs/run/config.yaml").read_bytes()).hexdigest()
    commit = json.loads((tmp_path / "runs/run/environment.json").read_text())["commit"]
    assert said == expected | {"commit": commit}
    encoder = fastsiam.load_encoder(result.run_dir)
    assert (encoder.mean, encoder.std, encoder.description) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), said)
    for path in (result.run_dir, f"{result.run_dir}/checkpoint.pt"):
        encoder = fastsiam.load_encoder(path)
        assert_weights(encoder, tmp_path / "runs/run/checkpoint.pt")
        assert encoder.description["step"] == 3


def test_encoder_and_checkpoint_name_the_last_knn_with_its_step(tiny, tmp_path):
    asked = ("train.max_steps=12", "evaluate.knn_k=5", "evaluate.controls=false")
    result = fastsiam.pretrain(load_config("quickstart", tiny(*asked)))
    file = tmp_path / "runs/run/encoder.safetensors"
    expected = {"knn": result.knn_top1, "knn_step": 12, "knn_k": 5, "knn_temperature": 0.07}
    for path in (file, file.with_name("checkpoint.pt")):
        assert expected.items() <= fastsiam.load_encoder(path).description.items()
    saved = torch.load(file.with_name("checkpoint.pt"), weights_only=True)["state"]
    assert (saved["knn"], saved["knn_step"]) == (result.knn_top1, 12)


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [("r50_100ep", IMAGENET_MEAN, IMAGENET_STD), ("r18_cifar10_800ep", CIFAR10_MEAN, CIFAR10_STD)],
)
def test_mean_and_std_are_those_of_the_recipe(config, mean, std):
    described = describe_encoder(load_config(config), 1, None)
    assert (described["mean"], described["std"]) == (list(mean), list(std))


def test_an_encoder_is_on_the_disk_before_it_has_its_name_and_has_the_mode_of_other_files(
    tiny_config, tmp_path, monkeypatch
):
    synced, sync = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda number: synced.append(os.fstat(number).st_size) or sync(number))
    path = tmp_path / "encoder.safetensors"
    before = os.umask(0o027)
    try:
        save_encoder(build_method(tiny_config()).encoder, describe_encoder(tiny_config(), 1, None), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_size in synced
    assert list(tmp_path.iterdir()) == [path]


def as_in_version_0_1_0(path):
    """Write an encoder.safetensors with the metadata that it had then."""
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["fastsiam"])
    kept = {key: said[key] for key in ("encoder", "stem", "width")}
    save_file(load_file(path), path, {"fastsiam": json.dumps(kept)})


def test_files_of_an_earlier_version_load(tiny, tmp_path):
    folder = tmp_path / "runs/run"
    assert main(["--config", "quickstart", *tiny("train.max_steps=3", "data.val=null")]) == 0
    as_in_version_0_1_0(folder / "encoder.safetensors")
    of_an_earlier_version(folder)
    config_hash = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
    for path in (folder, folder / "checkpoint.pt"):
        loaded = load_encoder(path)
        assert_weights(loaded, folder / "checkpoint.pt")
        # From the config.yaml beside it.
        assert loaded.mean == (0.5, 0.5, 0.5)
        found = loaded.description
        assert (found["crop_ratio"], found["config"], "fastsiam" in found) == (1.0, config_hash, False)
    assert (found["step"], found["images_seen"]) == (3, 24)
    for name in ("encoder.safetensors", "checkpoint.pt"):
        (folder / name).rename(tmp_path / name)
    alone = load_encoder(tmp_path / "encoder.safetensors")
    assert (alone.mean, alone.std) == (None, None)
    with refuses("no-description"):
        load_encoder(tmp_path / "checkpoint.pt")


@pytest.mark.slow
def test_the_encoder_of_a_run_that_runs_and_of_one_that_was_stopped(tiny, tmp_path):
    folder = tmp_path / "runs/run"
    long = ("train.epochs=1000", "views.size=32", "data.val=null", "collapse.action=off")
    process = start(tiny(*long, "checkpoint.every_seconds=0.01"))
    try:
        wait_for_step(process, folder, 3)
        for _ in range(5):
            assert load_encoder(folder).description["step"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    for path in (folder, folder / "checkpoint.pt"):
        encoder = load_encoder(path)
        assert_weights(encoder, folder / "checkpoint.pt")
        assert encoder(images()).isfinite().all()
    # A damaged checkpoint is passed over with a warning.
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="checkpoint.pt"):
        assert_weights(load_encoder(folder), folder / "checkpoint.1.pt")
    with refuses("damaged-checkpoint"):
        load_encoder(folder / "checkpoint.pt")


def test_a_finished_run_that_goes_on_gives_its_newest_encoder(tiny, tmp_path):
    folder = tmp_path / "runs/run"
    assert main(["--config", "quickstart", *tiny("train.epochs=1", "data.val=null")]) == 0
    assert main(["--config", "quickstart", *tiny("train.epochs=3", "train.max_steps=14", "data.val=null")]) == 0
    (folder / "status.json").write_text('{"status": "preempted"}')
    first = folder / "encoder.safetensors"
    with safe_open(first, "pt") as file:
        said = json.loads(file.metadata()["fastsiam"]) | {"step": 10}
    save_file(load_file(first), first, {"fastsiam": json.dumps(said)})
    assert load_encoder(folder).description["step"] == 14
    assert load_encoder(first).description["step"] == 10


def begun(folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")


def cut(path):
    save_file({"weight": torch.zeros(9)}, path)
    path.write_bytes(path.read_bytes()[:-4])


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


WEIGHT, STATE = {"weight": torch.zeros(9)}, {"epoch": 100, "state_dict": {"module.encoder.x": torch.ones(1)}}
EDITED = {"fastsiam": '{"encoder": "vit_b_16", "stem": "x", "width": 1}'}
# Paths that are no encoder of ours: code of the error, and how they are made.
OTHERS = {
    "resnet18.pth": ("other-program", lambda path: torch.save(WEIGHT, path)),
    "legacy.pth": ("other-program", lambda path: torch.save(WEIGHT, path, _use_new_zipfile_serialization=False)),
    "checkpoint_0099.pth.tar": ("other-program", lambda path: torch.save(STATE, path)),
    "whole_model.pt": ("code-in-file", lambda path: torch.save(nn.Linear(2, 2), path)),
    "timm.safetensors": ("other-program", lambda path: save_file(WEIGHT, path, {"format": "pt"})),
    "cut.safetensors": ("damaged-file", cut),
    "edited.safetensors": ("not-an-encoder", lambda path: save_file(WEIGHT, path, EDITED)),
    "photo.png": ("not-an-encoder", lambda path: Image.new("RGB", (4, 4)).save(path)),
    "notes.txt": ("not-an-encoder", lambda path: path.write_text("thesis")),
    "empty.pt": ("not-an-encoder", lambda path: path.write_bytes(b"")),
    "zip.pt": ("not-an-encoder", archive),
    "folder": ("no-run", lambda path: path.mkdir()),
    "runs": ("folder-of-runs", lambda path: begun(path / "x")),
    "begun": ("no-checkpoint-yet", begun),
    "nowhere": ("no-such-file", lambda path: None),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_encoder_of_ours_is_one_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    code, make = OTHERS[kind]
    make(tmp_path / kind)
    with refuses(code) as error:
        load_encoder(kind)
    said = str(error.value)
    assert len(said) <= 300
    assert "\n" not in said
    assert kind in said
