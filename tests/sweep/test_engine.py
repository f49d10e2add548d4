"""Processes of a sweep: side by side, failing, stopped, killed, and started again; `fake_train` stands for training."""

import json
import os
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from fastsiam.config import load_config
from fastsiam.run.reading import ending
from fastsiam.sweep import scores, slots
from fastsiam.sweep.engine import exit_code, opened, train_all
from fastsiam.sweep.grid import parse, variants_of
from fastsiam.sweep.outcome import conclude
from fastsiam.sweep.plan import plan_of
from tests.support.processes import run_python
from tests.support.refusals import refuses

FAKE = (sys.executable, "-m", "tests.support.fake_train")


@pytest.fixture
def sweep(tmp_path, capsys):
    """A function that trains a grid of fake runs; returns plan, ledger and the signal that stopped it."""

    def train(*arguments, devices=(), folder="sweep", **options):
        plan = plan_of(variants_of("quickstart", parse(arguments)), tmp_path / folder, **options)
        with opened(plan) as ledger:
            stopped = train_all(plan, ledger, Console(), devices=devices, trainer=FAKE)
        return plan, ledger, stopped

    return train


def starts(tmp_path):
    return [json.loads(line) for line in (tmp_path / "sweep/starts.txt").read_text().splitlines()]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_failing_run_stops_no_other_and_is_tried_again(sweep, tmp_path, capsys):
    plan, ledger, stopped = sweep("optimizer.base_lr=2,3,5,7,4", at_once=3)
    ends = {end.label: (end.status, end.said) for end in map(ledger.last, [one.name for one in plan.variants])}
    assert ends == {
        "base_lr=2": ("done", ""),
        "base_lr=3": ("refused", "data.train: nowhere is not a folder [no-such-folder]"),
        "base_lr=5": ("collapsed", "z has collapsed"),
        "base_lr=7": ("crashed", "killed by SIGKILL, as the kernel does where memory is short; its last line: a line"),
        "base_lr=4": ("done", ""),
    }
    assert (stopped, exit_code(plan, ledger, stopped)) == (None, 2)
    rows = conclude(plan, ledger, Console(), "title", lambda best, measure: f"train {best.label}")
    assert [row.label for row in rows][:2] == ["base_lr=4", "base_lr=2"]
    said = capsys.readouterr().out
    assert "best      base_lr=4: kNN 40.00 %; 20.00 points above base_lr=2" in said
    assert "go on     train base_lr=4" in said
    assert "refused   base_lr=3_seed=0: data.train: nowhere is not a folder" in said
    # What is done or has collapsed is not trained again.
    before = len(starts(tmp_path))
    sweep("optimizer.base_lr=2,3,5,7,4")
    assert [start["name"] for start in starts(tmp_path)[before:]] == ["base_lr=3_seed=0", "base_lr=7_seed=0"]


def test_page_and_table_have_the_numbers(sweep, tmp_path):
    plan, ledger, _ = sweep("optimizer.base_lr=2,4,5", "train.seed=0..2", at_once=3)
    conclude(plan, ledger, Console(), "a <title>")
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())
    best = found["settings"][0]
    # kNN 40, 41, 42; std_ratio 0.5, 0.6, 0.7; 800 images in 2 s.
    assert (best["label"], best["score"]) == ("base_lr=4", {"n": 3, "mean": 41.0, "spread": 1.0})
    assert best["loss"]["mean"] == pytest.approx(-0.4)
    assert (best["std_ratio"]["mean"], best["images_per_second"]["mean"]) == (pytest.approx(0.6), 400.0)
    assert len(found["runs"]) == 9
    text = (tmp_path / "sweep/report.html").read_text()
    assert "41.00 ± 1.00" in text
    assert "a &lt;title&gt;" in text
    assert "z has collapsed" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_rankme_is_compared_where_there_are_no_labels(sweep):
    plan, ledger, _ = sweep("optimizer.base_lr=2,4", "data.val=null")
    assert [row.score.mean for row in scores.table(plan, ledger)] == [80.0, 40.0]
    # Of a run that has left kNN out there is RankMe, which then compares all of them.
    plan, ledger, _ = sweep("optimizer.base_lr=2,4", "data.val=elsewhere,data/demo/val", folder="other")
    assert [row.score.mean for row in scores.table(plan, ledger)] == [80.0, 80.0, 40.0, 40.0]


def test_halving_resumes_the_same_folders_further(sweep, tmp_path):
    plan, ledger, _ = sweep("optimizer.base_lr=1,2,4,6,8", "budget=100s", halving=True, budget="90k images", at_once=2)
    seen = [(start["name"][:9], start["share"]) for start in starts(tmp_path)]
    assert sorted(seen[:5]) == [(f"base_lr={lr}", 0.25) for lr in (1, 2, 4, 6, 8)]
    assert sorted(seen[5:8]) == [(f"base_lr={lr}", 0.5) for lr in (4, 6, 8)]
    assert sorted(seen[8:]) == [("base_lr=6", 1.0), ("base_lr=8", 1.0)]
    # 5/4 + 3/4 + 2/2 whole runs.
    assert {start["budget"] for start in starts(tmp_path)} == {"30000 images"}
    rows = conclude(plan, ledger, Console(), "title")
    assert [(row.label, row.share) for row in rows] == [
        ("base_lr=8", 1.0), ("base_lr=6", 1.0), ("base_lr=4", 0.5), ("base_lr=2", 0.25), ("base_lr=1", 0.25),
    ]  # fmt: skip


def test_each_run_has_its_gpu_and_its_share_of_the_cores(sweep, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(slots, "usable_cores", lambda: 8)
    sweep("optimizer.base_lr=1,2,4", at_once=3, devices=["3", "GPU-5", "6"])
    found = {(s["CUDA_VISIBLE_DEVICES"], s["OMP_NUM_THREADS"], s["workers"]) for s in starts(tmp_path)}
    assert found == {("3", "2", 2), ("GPU-5", "2", 2), ("6", "2", 2)}
    # A Ctrl-C of the terminal must not reach them beside that of the sweep: the second one would end them at once.
    assert all(start["leads_session"] for start in starts(tmp_path))
    assert slots.overrides_of(load_config("quickstart", ["data.workers=5"]), 3) == []
    assert "OMP_NUM_THREADS" not in slots.environment_of(0, 1, [], {})


def test_gpus_are_those_that_torch_sees(monkeypatch):
    def found(count, **environment):
        monkeypatch.setattr(slots, "_COUNT", f"print({count})")
        return slots.gpus(environment)

    monkeypatch.setattr(slots, "_driver_has_gpus", lambda: True)
    assert found(2) == ["0", "1"]
    assert found(2, CUDA_VISIBLE_DEVICES="GPU-a, 5") == ["GPU-a", "5"]
    # A torch without CUDA, beside a driver.
    assert found(0) == found(0, CUDA_VISIBLE_DEVICES="") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_runs_and_the_same_command_goes_on(sweep, tmp_path, number):
    folder = tmp_path / "sweep"
    trains = [folder / f"base_lr=9_seed={seed}/trains" for seed in (0, 1)]

    def stop():
        wait_for(lambda: all(path.exists() for path in trains))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    arguments = ["optimizer.base_lr=9,4", "train.seed=0..1"]
    plan, ledger, stopped = sweep(*arguments, at_once=2)
    thread.join()
    assert (stopped, exit_code(plan, ledger, stopped)) == (number, 128 + number)
    # Both have saved, and the others were not begun; none of them has ended.
    assert [ledger.last(one.name) for one in plan.variants] == [None] * 4
    assert all(path.with_name("saved").exists() for path in trains)
    assert sorted(start["name"] for start in starts(tmp_path)) == ["base_lr=9_seed=0", "base_lr=9_seed=1"]
    plan, ledger, stopped = sweep(*arguments, at_once=2)
    assert (stopped, exit_code(plan, ledger, stopped)) == (None, 0)


KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from fastsiam.sweep.engine import opened, train_all
from fastsiam.sweep.grid import parse, variants_of
from fastsiam.sweep.plan import plan_of
plan = plan_of(variants_of("quickstart", parse(["optimizer.base_lr=9,2"])), Path(sys.argv[1]))
with opened(plan) as ledger:
    train_all(plan, ledger, Console(), trainer=(sys.executable, "-m", "tests.support.fake_train"))
"""


def test_a_killed_sweep_leaves_no_run_training(sweep, tmp_path):
    process = run_python("-c", KILLED, tmp_path / "sweep", wait=False)
    run = tmp_path / "sweep/base_lr=9_seed=0"
    wait_for((run / "trains").exists)
    with refuses("sweep-locked", "run.name"):
        sweep("optimizer.base_lr=9,2")
    process.kill()
    process.communicate()
    # The kernel asks the orphan to end.
    wait_for((run / "saved").exists)
    plan, ledger, _ = sweep("optimizer.base_lr=9,2")
    assert [ledger.last(one.name).status for one in plan.variants] == ["done", "done"]
    assert ending(run) == "done"


def test_another_sweep_is_not_trained_into_the_folder(sweep, tmp_path):
    sweep("optimizer.base_lr=2,4")
    # More values are no other sweep where the runs share nothing.
    sweep("optimizer.base_lr=2,4,6")
    assert len(starts(tmp_path)) == 3
    # A config that has been edited meanwhile would train the rest with other values.
    with refuses("other-config", "run.name") as caught:
        sweep("optimizer.base_lr=2,4,6,8", "optimizer.momentum=0.5")
    assert "optimizer.momentum (0.9, now 0.5)" in str(caught.value)
    for arguments, options in (
        (["optimizer.base_lr=2,6"], {}),
        (["optimizer.base_lr=2,4,6"], {"budget": "60k images"}),
        (["optimizer.base_lr=2,4,6"], {"halving": True}),
        (["optimizer.base_lr=2,4,6", "data.val=null"], {}),
    ):
        with refuses("other-sweep", "run.name"):
            sweep(*arguments, **options)
    assert len(starts(tmp_path)) == 3
