"""The host's time for a step's draws, this code's and another's in turns."""

import json

import numpy as np
import pytest

from benchmarks import host
from benchmarks.tables import TABLES, render
from benchmarks.variants import host as parts
from fastsiam.config import load_config


def test_each_part_is_measured_on_the_batch_it_is_for(monkeypatch):
    """A clock that counts calls: every sample of a part is one call."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(parts.time, "thread_time", lambda: next(ticks))
    config = load_config("r18_cifar10_800ep", ["data.backend=synthetic"])
    found = parts.samples(config, 8, 2)
    assert {name: seconds for name, seconds in found.items() if name != "hand-over to DALI"} == {
        "boxes": [1, 1], "augmentations": [1, 1], "table": [1, 1],
    }  # fmt: skip
    calls = parts.parts(config, 8)
    assert calls["boxes"](0).shape == (2, 8, 4)
    assert len(calls["augmentations"](0).flip) == len(calls["table"](0)) == 16
    assert not np.array_equal(calls["boxes"](0), calls["boxes"](1))


def test_the_codes_take_turns_and_the_table_shows_them(tmp_path, monkeypatch):
    asked = []

    def measured(imports, config, batch):
        asked.append(imports)
        return {"boxes": [0.001, 0.002], "table": [0.003, 0.003]}

    monkeypatch.setattr(host, "measured", measured)
    monkeypatch.setattr(host, "ROUNDS", 2)
    assert host.main(["--config", "r18_cifar10_800ep", "--against", "HEAD", "--out", str(tmp_path)]) == 0
    assert asked[0] == asked[2] == host.HERE
    assert asked[1] == asked[3] != host.HERE
    lines = [json.loads(line) for line in (tmp_path / "host.jsonl").read_text().splitlines()]
    medians = {line["variant"]: line["median_seconds"] for line in lines}
    assert medians == pytest.approx({
        "boxes": 0.0015, "table": 0.003, "all": 0.0045,
        "boxes at HEAD": 0.0015, "table at HEAD": 0.003, "all at HEAD": 0.0045,
    })  # fmt: skip
    assert "| all | 4.50 [4.00, 5.00] |" in render(TABLES["host"], lines)
