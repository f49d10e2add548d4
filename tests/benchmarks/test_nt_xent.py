"""benchmarks.nt_xent: the bytes that it counts, its lines, its refusal of a wrong loss."""

import json

import pytest
import torch

from benchmarks import nt_xent
from benchmarks.harness import timing
from benchmarks.harness.results import Results

CPU = torch.device("cpu")


def test_the_peak_is_what_is_alive_at_a_time():
    def call():
        for _ in range(3):
            _ = torch.ones(1000), torch.ones(250)

    assert timing.allocated_at_peak(call, CPU) == pytest.approx(5000, abs=256)


def test_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1024)
    monkeypatch.setattr(nt_xent, "CASES", (nt_xent.Case(64, 8), nt_xent.Case(2, 8)))
    losses = nt_xent.variants(CPU)
    monkeypatch.setattr(nt_xent, "variants", lambda device: {**losses, "lightly": losses["eager"]})
    nt_xent.run(Results(tmp_path, CPU), device=CPU, minutes=0)
    found = [json.loads(text) for text in (tmp_path / "nt_xent.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in found] == ["fastsiam", "lightly", "eager"] * 2
    assert found[0]["time_of_lightly"] == found[0]["median_seconds"] / found[1]["median_seconds"]
    assert found[0]["memory_of_lightly"] == found[0]["peak_memory_bytes"] / found[1]["peak_memory_bytes"]
    # A matrix [128, 128] in fp32 at least.
    assert found[1]["peak_memory_bytes"] >= 128 * 128 * 4


def test_a_wrong_loss_is_not_timed():
    loss = nt_xent.variants(CPU)["eager"]
    with pytest.raises(RuntimeError, match="nt_xent: twice at .*: the value is off by 1 from float64"):
        nt_xent.check("twice", lambda a, b: 2 * loss(a, b), nt_xent.Case(4, 8), CPU)


def test_goals_say_whether_they_are_met():
    large, small = nt_xent.CASES
    against = {"memory_of_lightly": 0.125, "time_of_lightly": 0.71}
    assert nt_xent.goals_in_words(large, against) == "memory at most 0.125x: met, time at most 0.7x: missed"
    assert nt_xent.goals_in_words(small, against) == "time at most 1x: met"
