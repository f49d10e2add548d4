"""The benchmark of budgets: what it asks of a run, and what it makes of what came out."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import budget
from benchmarks.harness.results import Results
from fastsiam.config import load_config


def test_a_process_is_timed_to_its_end_or_to_its_kill():
    """From outside; a process that fails is no measurement."""
    script = [sys.executable, "-c", "import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"]
    began = time.monotonic()
    assert 0.3 <= budget.live([*script, "0.3", "0"]) <= time.monotonic() - began
    began = time.monotonic()
    assert 0.2 <= budget.live([*script, "600", "0"], 0.2) <= time.monotonic() - began
    with pytest.raises(AssertionError):
        budget.live([*script, "0", "3"])
    with pytest.raises(AssertionError):
        budget.live([*script, "0", "0"], 60)


def test_the_line_sets_both_accounts_beside_the_budget(monkeypatch, tmp_path):
    asked = []

    def live(start, killed_after=None):
        overrides = start[start.index("--config") + 2 :]
        config = load_config(start[start.index("--config") + 1], overrides)
        asked.append((config.budget, killed_after, config.checkpoint.every_seconds))
        end = {"kind": "end", "status": "done", "step": 90, "spent_seconds": 109.0, "knn_top1": 71.0}
        folder = Path(config.run.dir) / config.run.name
        folder.mkdir(exist_ok=True)
        lines = [{"kind": "resume", "step": 20}, end]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 36.5 if killed_after else 74.5

    monkeypatch.setattr(budget, "live", live)
    monkeypatch.setattr(budget.time, "sleep", lambda seconds: None)
    budget.run(Results(tmp_path, torch.device("cpu")), device=torch.device("cpu"), minutes=2.0)
    assert asked == [("110s", pytest.approx(110 / 3), pytest.approx(110 / 12, abs=0.01)), ("110s", None, asked[1][2])]
    line = json.loads((tmp_path / "budget.jsonl").read_text())
    assert (line["lived_seconds"], line["lived_share"]) == (111.0, pytest.approx(111 / 110))
    assert line["spent_share"] == pytest.approx(109 / 110)
    assert (line["resumed_at_step"], line["steps"], line["knn_top1"]) == (20, 90, 71.0)
