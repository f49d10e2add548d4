"""Runs that begin with weights: what is said and recorded, and what is refused before anything is written."""

import argparse
import contextlib
import copy
import io
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import fastsiam
from fastsiam.config import load_config
from fastsiam.models.encoder import build_encoder
from fastsiam.replay.forward import initial
from fastsiam.replay.recorded import read_recorded
from fastsiam.report import summary
from fastsiam.report.read_run import open_run
from fastsiam.run.encoder_file import load_encoder
from fastsiam.run.start_weights import start_weights
from fastsiam.run.weight_files import read_file
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.train import main
from tests.support.foreign_weights import FORMATS, RESNET, body, features, loaded, resnet18, sha256, under
from tests.support.gloo_ranks import world
from tests.support.refusals import refuses
from tests.support.runs import lines, refused_unwritten


@pytest.fixture(scope="module")
def network():
    return resnet18(0)


@pytest.fixture
def weights_file(tmp_path, network):
    path = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return path


def test_a_chain_of_runs_says_what_each_began_with(tiny, tmp_path, capsys):
    runs, more = tmp_path / "runs", ("train.max_steps=2", "evaluate.controls=true")
    first = fastsiam.pretrain(load_config("quickstart", tiny("run.name=a", "train.max_steps=2")))
    source = runs / "a/encoder.safetensors"
    config = load_config("quickstart", tiny("run.name=b", f"model.weights={runs}/a", "train.seed=5", *more))
    assert main(["--config", "quickstart", *tiny("run.name=b", f"model.weights={runs}/a", "train.seed=5", *more)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    record = {"source": f"{runs}/a", "sha256": sha256(source), "matched": 45}
    assert f"weights {runs}/a (sha256 {record['sha256'][:12]}): 45 of 45 tensors matched by their names" in printed
    # The control is the encoder that was loaded, as the run before it measured it at its end.
    (control,) = [line for line in lines(runs / "b") if "control" in line]
    assert (control["control"], control["knn_top1"]) == ("start", first.knn_top1)
    assert json.loads((runs / "b/environment.json").read_text())["weights"] == record
    assert load_encoder(runs / "b").description["weights"] == record
    assert load_encoder(runs / "b/checkpoint.pt").description["weights"] == record
    assert config.model.weights in (runs / "b/config.yaml").read_text()
    assert torch.equal(loaded(config)[0].conv1.weight, load_encoder(source).conv1.weight)
    assert "weights" not in load_encoder(source).description
    # A third run, from the checkpoint of the second.
    third = load_config("quickstart", tiny("run.name=c", f"model.weights={runs}/b/checkpoint.pt", *more))
    _, weights = loaded(third)
    assert weights.record["earlier"] == record
    assert weights.record["sha256"] == sha256(runs / "b/checkpoint.pt")
    facts = {fact.label: (fact.value, fact.note) for fact in summary.facts(open_run(runs / "b", "b"))}
    assert facts["Started from"] == (f"{runs}/a", f"45 tensors, sha256 {record['sha256'][:12]}")
    assert "at the start" in summary.result(open_run(runs / "b", "b")).note


def test_a_replay_from_the_start_begins_with_the_same_file(tiny, tmp_path):
    own, recorded = tmp_path / "own.pt", []
    for seed in (3, 4):
        torch.manual_seed(seed)
        theirs = build_encoder("cifar_resnet8", "cifar", 8, False)
        torch.save(theirs.state_dict(), own)
        if not recorded:
            assert main(["--config", "quickstart", *tiny(f"model.weights={own}", "train.max_steps=1")]) == 0
            recorded.append(read_recorded(tmp_path / "runs/run", None, print))
            runtime = Runtime.of(recorded[0].config.train, World(), {})
            encoder = initial(recorded[0], runtime, None).method.encoder
            torch.testing.assert_close(encoder.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    with refuses("other-weights", "model.weights"):
        initial(recorded[0], runtime, None)


def test_a_resumed_run_takes_its_checkpoint_and_keeps_the_record(tiny, tmp_path):
    own = tmp_path / "own.pt"
    torch.manual_seed(3)
    torch.save(build_encoder("cifar_resnet8", "cifar", 8, False).state_dict(), own)
    keys = (f"model.weights={own}", "data.val=null", "train.epochs=1")
    assert main(["--config", "quickstart", *tiny(*keys, "train.max_steps=2")]) == 0
    digest = sha256(own)
    own.unlink()
    assert main(["--config", "quickstart", *tiny(*keys, "train.max_steps=3")]) == 0
    description = load_encoder(tmp_path / "runs/run").description
    assert (description["step"], description["weights"]["sha256"]) == (3, digest)
    assert json.loads((tmp_path / "runs/run/environment.json").read_text())["weights"]["sha256"] == digest


def test_training_begins_with_the_weights_and_heads_are_those_of_the_seed(tiny_config, tmp_path):
    from fastsiam.methods import build_method
    from fastsiam.train import opened

    own = tmp_path / "own.pt"
    torch.manual_seed(3)
    theirs = build_encoder("cifar_resnet8", "cifar", 8, False)
    torch.save(under("module.", theirs.state_dict()), own)
    with opened(tiny_config(f"model.weights={own}")) as (parts, _):
        method = copy.deepcopy(parts.step.method).cpu()
    torch.testing.assert_close(method.encoder.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    torch.manual_seed(0)
    plain = build_method(tiny_config())
    torch.testing.assert_close(method.projector.state_dict(), plain.projector.state_dict(), atol=0, rtol=0)


def test_what_was_loaded_is_not_kept_beside_the_encoder(tiny_config, weights_file):
    held = []

    class Encoder(nn.Module):
        def load_state_dict(self, state, strict):
            held.extend(map(weakref.ref, state.values()))

    weights = start_weights(tiny_config(*RESNET, f"model.weights={weights_file}"), World())
    weights.load_into(Encoder())
    # With the counters of 20 batch norms.
    assert [tensor() for tensor in held] == [None] * 120
    assert "100 of 100 tensors" in weights.lines()[0]


def test_a_dry_run_says_the_same_and_writes_nothing(tiny, weights_file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["--config", "quickstart", *tiny(*RESNET, f"model.weights={weights_file}"), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "dropped 2 (fc.weight, fc.bias)" in printed.err
    assert "100 of 100 tensors matched by their names, missing 0, other shapes 0" in printed.err
    assert f"weights: {weights_file}" in printed.out
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_the_hub_and_safetensors(tiny_config, network, tmp_path):
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for where in (tmp_path, tmp_path / "model.safetensors"):
        encoder, weights = loaded(tiny_config(*RESNET, f"model.weights={where}"))
        assert weights.record["sha256"] == sha256(tmp_path / "model.safetensors")
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(encoder(images), features(network, images), atol=1e-6, rtol=1e-6)


def test_partial_weights_leave_the_rest_at_random_and_name_every_shape(tiny_config, network, tmp_path):
    path = tmp_path / "part.pth"
    state = body(network)
    del state["layer4.1.conv2.weight"]
    torch.save(state, path)
    config = tiny_config("model.encoder=resnet18", "model.width=null", f"model.weights={path}")
    with refuses("weights-do-not-fit", "model.weights") as error:
        start_weights(config, World())
    said = str(error.value)
    assert "98 of the 100 tensors of resnet18 (missing 1 (layer4.1.conv2.weight);" in said
    assert "conv1.weight [64, 3, 7, 7], here [64, 3, 3, 3]" in said
    encoder, weights = loaded(config.with_values({"model.weights_partial": True}))
    assert torch.equal(encoder.layer1[0].conv1.weight, network.layer1[0].conv1.weight)
    assert not torch.equal(encoder.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    assert encoder.conv1.weight.shape == (64, 3, 3, 3)
    assert "other shapes 1 (conv1.weight [64, 3, 7, 7], here [64, 3, 3, 3])" in weights.lines()[0]


def test_options_and_numbers_beside_the_weights_are_read(tmp_path):
    path = tmp_path / "checkpoint.pth"
    contents = {"args": argparse.Namespace(out=Path("a"), lr=0.1), "best": np.float64(3.5), "epoch": np.int64(7)}
    torch.save(contents, path)
    assert read_file(path) == contents


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/fastsiam-ran",)


def not_finite(network, path):
    state = network.state_dict()
    state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"].clone().fill_(torch.nan)
    torch.save(state, path)


def truncated(network, path):
    torch.save(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000000])


def flipped(network, path):
    torch.save(network.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_resnet50(network, path):
    torch.save({"state_dict": under("module.", torchvision.models.resnet50().state_dict())}, path)


def fewer(network, path):
    torch.save({name: value for name, value in body(network).items() if not name.startswith("layer4.")}, path)


PAGE = "\n<!DOCTYPE html><html><head><title>Not found</title></head></html>"
NOTHING = {f"w{number}": torch.ones(3) for number in range(20)}
# Files and folders that are no weights of a ResNet-18: code of the error, and how they are made.
BAD = {
    "resnet50.pth": ("weights-do-not-fit", of_resnet50),
    # Holds every tensor of a ResNet-18, and more blocks.
    "resnet34.pth": (
        "weights-do-not-fit",
        lambda network, path: torch.save(torchvision.models.resnet34().state_dict(), path),
    ),
    "nan.pth": ("weights-not-finite", not_finite),
    "code.pth": ("code-in-file", lambda network, path: torch.save({"state_dict": Runs()}, path)),
    "script.pt": (
        "code-in-file",
        lambda network, path: torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1)), path),
    ),
    "module.pth": ("code-in-file", lambda network, path: torch.save(nn.Linear(1, 1), path)),
    "empty.pth": ("not-an-encoder", lambda network, path: path.write_bytes(b"")),
    "folder": ("no-run", lambda network, path: path.mkdir()),
    "nowhere.pth": ("no-such-file", lambda network, path: None),
    "truncated.pth": ("damaged-checkpoint", truncated),
    "flipped.pth": ("damaged-checkpoint", flipped),
    "page.pth": ("not-an-encoder", lambda network, path: path.write_text(PAGE)),
    "pointer.pth": ("not-an-encoder", lambda network, path: path.write_text("version https://git-lfs.github.com/spec/v1\n")),
    "unrelated.pth": ("weights-of-another-model", lambda network, path: torch.save(NOTHING, path)),
    "list.pth": ("weights-of-another-model", lambda network, path: torch.save([torch.ones(2)], path)),
    "fewer.pth": ("weights-do-not-fit", fewer),
    "short.safetensors": ("damaged-file", lambda network, path: path.write_bytes(b"\x40\0\0\0\0\0\0\0{}")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_weights_are_one_sentence_and_nothing_is_written(tiny, network, tmp_path, capsys, kind):
    code, make = BAD[kind]
    path = tmp_path / kind
    make(network, path)
    error = refused_unwritten(capsys, tmp_path, *tiny(*RESNET, f"model.weights={path}"))
    assert (error.code, error.key) == (code, "model.weights")
    assert kind in str(error)
    assert not os.path.exists("/tmp/fastsiam-ran")
    if kind.startswith("resnet"):
        assert f"set model.encoder={kind.removesuffix('.pth')}" in str(error)


def test_the_weights_of_another_encoder_of_ours_say_which(tiny_config, tmp_path):
    from fastsiam.run.encoder_file import describe_encoder, save_encoder

    config = tiny_config("model.width=16")
    path = tmp_path / "encoder.safetensors"
    save_encoder(build_encoder("cifar_resnet8", "cifar", 16, False), describe_encoder(config, 1, None), path)
    with refuses("weights-do-not-fit", "model.weights") as error:
        start_weights(tiny_config(f"model.weights={path}"), World())
    assert "set model.width=16" in str(error.value)


def of_one_rank(config, paths):
    config = config.with_values({"model.weights": paths[world().rank]})
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            return start_weights(config, world()).record["sha256"]
        except SystemExit as ended:
            return ended.code
        except ValueError as refusal:
            return str(refusal)


def test_ranks_have_the_same_file_wherever_it_lies(ranks, tiny_config, tmp_path):
    paths = [str(tmp_path / f"{number}.pt") for number in range(3)]
    for path in paths:
        torch.save(build_encoder("cifar_resnet8", "cifar", 8, False).state_dict(), path)
    shutil.copy(paths[0], paths[1])
    config = tiny_config()
    same = ranks(2, of_one_rank, config, paths[:2])
    assert same[0] == same[1] == sha256(tmp_path / "0.pt")
    first, second = ranks(2, of_one_rank, config, [paths[0], paths[2]])
    assert (second, "all ranks must have the same" in first) == (2, True)


@pytest.mark.parametrize("project", ["SimSiam's authors", "torchvision", "DINO"])
def test_load_encoder_reads_networks_of_torchvision_in_files_of_others(network, tmp_path, project):
    path = tmp_path / "checkpoint_0099.pth.tar"
    torch.save(FORMATS[project][0](network, resnet18(1)), path)
    encoder = load_encoder(path)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(images), features(network, images), atol=1e-6, rtol=1e-6)
    assert (encoder.mean, encoder.std) == (None, None)
    assert encoder.description["encoder"] == "resnet18"
    assert encoder.description["weights"] == {"source": str(path), "sha256": sha256(path), "matched": 100}


def test_a_size_that_the_encoder_does_not_take_is_refused_before_anything_is_written(tiny, tmp_path, capsys):
    keys = ("model.encoder=vit_b_32", "model.stem=imagenet", "model.width=null", "views.size=128..224")
    error = refused_unwritten(capsys, tmp_path, *tiny(*keys))
    assert (error.code, error.key) == ("size-of-encoder", "views.size")
