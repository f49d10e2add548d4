"""Runs with micro batches, recomputed activations and averaged weights: killed, stopped, resumed and exported."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fastsiam
from fastsiam.evaluate.online import OnlineEvaluation
from fastsiam.train import main
from tests.support.refusals import refused
from tests.support.runs import EVERY_STEP, assert_same_run, die_at, lines, train_here

SMALL = ("train.micro_batch=4", "train.checkpoint_activations=true", "evaluate.average=ema")


def average(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["average"]


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_average_of_an_undisturbed_run(tiny, tmp_path):
    runs, overrides = tmp_path / "runs", tiny(*SMALL, "train.epochs=1", "data.val=null")
    assert main(["--config", "quickstart", *overrides, "run.name=whole"]) == 0
    for step in (3, 7):
        with pytest.raises(RuntimeError, match="killed"):
            train_here([*overrides, EVERY_STEP, "run.name=killed"], spoil=die_at(step))
        half_way = fastsiam.load_encoder(runs / "killed/checkpoint.pt")
        assert half_way.description["average"] == "ema"
        assert half_way.description["step"] == step - 1
        for name, value in average(runs / "killed").items():
            assert torch.equal(half_way.state_dict()[name], value)
    train_here([*overrides, "run.name=killed"])
    assert [line["step"] for line in lines(runs / "killed") if line["kind"] == "resume"] == [2, 6]
    assert_same_run(runs / "whole", runs / "killed")
    torch.testing.assert_close(average(runs / "killed"), average(runs / "whole"), atol=0, rtol=0)
    exported, newest = load_file(runs / "killed/encoder.safetensors"), average(runs / "whole")
    torch.testing.assert_close(exported, newest, atol=0, rtol=0)
    last = torch.load(runs / "killed/checkpoint.pt", weights_only=True)["method"]
    assert (exported["conv1.weight"] - last["encoder.conv1.weight"]).abs().max() > 1e-4


def test_knn_is_that_of_the_average(tiny, tmp_path, monkeypatch, capsys):
    seen = []
    real = OnlineEvaluation.knn

    def spy(self, encoder, *arguments):
        seen.append({name: value.clone() for name, value in encoder.state_dict().items()})
        return real(self, encoder, *arguments)

    monkeypatch.setattr(OnlineEvaluation, "knn", spy)
    train_here(tiny(*SMALL, "evaluate.knn_every_epochs=null"))
    torch.testing.assert_close(seen, [average(tmp_path / "runs/run")], atol=0, rtol=0)
    said = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line for line in said if line}
    assert "2 x 4 images" in told["micro"]
    # The paper's accuracy at the nearest batch of its Table 2.
    assert "66.1 % at 64" in told["micro"]
    assert {"recompute", "average"} < told.keys()
    assert "averaged weights" in [line for line in said if line.startswith("kNN")][-1]


def test_a_run_keeps_its_choice_of_average_and_may_change_what_is_recomputed(tiny, tmp_path):
    overrides = tiny("train.max_steps=2", "data.val=null")
    assert main(["--config", "quickstart", *overrides]) == 0
    saved = torch.load(tmp_path / "runs/run/checkpoint.pt", weights_only=True)
    # As an earlier version has written it.
    del saved["average"], saved["encoder"]["average"]
    torch.save(saved, tmp_path / "runs/run/checkpoint.pt")
    for key, value in (("evaluate.average", "ema"), ("train.micro_batch", "4")):
        error = refused("train", "--config", "quickstart", *overrides, f"{key}={value}")
        assert error.code == "other-config"
        assert key in str(error)
    more = ("train.max_steps=4", "train.checkpoint_activations=true")
    assert main(["--config", "quickstart", *overrides, *more]) == 0
    assert json.loads((tmp_path / "runs/run/status.json").read_text())["step"] == 4
    assert fastsiam.load_encoder(tmp_path / "runs/run").description["average"] == "none"
