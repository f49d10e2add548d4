"""What a person and a script read of a run."""

import io
import json

import pytest
import torch
from rich.console import Console

from fastsiam.config import load_config
from fastsiam.run.console import choice_lines
from fastsiam.run.folder import RunFolder, run_path
from fastsiam.run.lines import KINDS
from fastsiam.run.metrics import Journal
from fastsiam.run.progress_line import ProgressLine, duration
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.train import main

TEXT = "epoch 3/9  step 150/558  loss -0.530 (cosine 0.530)  std_ratio 0.58 rank 4 |cos| 0.67  159 img/s  wait 7 %"


def shown(terminal):
    out = io.StringIO()
    line = ProgressLine(Console(file=out, force_terminal=terminal, width=80), "decoding the first batch")
    yield out.getvalue()
    line.show(0.3, TEXT)
    line.show(1.0, TEXT)
    line.close()
    yield out.getvalue()


def test_a_narrow_terminal_shows_the_whole_line():
    at_once, text = shown(terminal=True)
    assert "decoding the first batch" in at_once
    assert "wait 7 %" in text
    assert "ETA 0:00" in text
    assert "\u2026" not in text


def test_elsewhere_each_interval_is_one_plain_line():
    at_once, text = shown(terminal=False)
    assert at_once == ""
    assert text.splitlines() == [TEXT, TEXT + "  ETA 0:00"]


@pytest.mark.parametrize(("terminal", "every"), [(True, 2), (False, 60)])
def test_the_first_numbers_are_due_at_once_and_the_next_by_time(terminal, every):
    now = [100.0]
    console = Console(file=io.StringIO(), force_terminal=terminal)
    line = ProgressLine(console, "", clock=lambda: now[0])
    assert line.is_due()
    line.show(0.0, TEXT)
    found = []
    for _ in range(4 * every):
        now[0] += 0.5
        found.append(line.is_due())
        if found[-1]:
            line.show(0.0, TEXT)
    line.close()
    assert [i for i, due in enumerate(found, 1) if due] == [2 * every, 4 * every]


@pytest.mark.parametrize(
    ("device", "count", "optimizer", "loss"),
    [
        ("cuda", 2, "lars (trust 0.001)", "fused (Triton)"),
        ("cuda", 4, "sgd", "in plain torch"),
        ("cpu", 2, "sgd", "in plain torch"),
    ],
)
def test_the_first_lines_are_the_decision(tiny_config, device, count, optimizer, loss):
    """Whatever this machine would decide."""
    config = tiny_config(f"views.count={count}", f"optimizer.name={optimizer[:4].strip()}", "train.precision=auto")
    reasons = {"device": "auto: here", "dtype": "auto: as before", "compile": "auto: why"}
    for dtype, name, compiles in ((torch.bfloat16, "bf16", True), (torch.float16, "fp16", False)):
        runtime = Runtime(World(), torch.device(device), dtype, compiles, reasons)
        lines = choice_lines(config, runtime, 80, 0, "a loader", "as chosen", "here", [])
        (step,) = (line for line in lines if line.startswith("step "))
        assert f", {optimizer}, channels-last, loss {loss}" in step
        compiled = "on" if compiles else "off"
        assert f"device    {device} (auto: here), {name} (auto: as before), compile {compiled} (auto: why)" in lines
        assert "backend   a loader, as chosen" in lines


@pytest.mark.parametrize(
    ("name", "views", "model"),
    [
        (
            "r50_100ep_byol_b4096",
            "recipe byol_1 + 1 x 224 px of each image, recipe byol_2, ",
            "momentum target from 0.99",
        ),
        (
            "r50_100ep_swav_b4096",
            "2 x 224 px, recipe swav + 6 x 96 px of",
            "3,000 prototypes, no queue, T 0.1, batch-norm",
        ),
        (
            "r50_100ep_fastsiam",
            "4 x 224 px of each image, recipe simsiam, ",
            "each view predicts the mean of 3, batch-norm",
        ),
        ("r50_100ep_simclr", "2 x 224 px, recipe simsiam, ", "no predictor, T 0.1, batch-norm statistics per_view"),
        ("r18_cifar10_800ep_moco_demo", "recipe moco_cifar10, ", "queue 4,096, momentum 0.99, T 0.1, symmetric loss, "),
    ],
)
def test_the_first_lines_name_a_methods_numbers_and_all_groups_of_views(name, views, model):
    runtime = Runtime(World(), torch.device("cpu"), torch.float32, False)
    lines = choice_lines(load_config(name), runtime, 80, 0, "a loader", "as chosen", "here", [])
    assert [[text in line for line in lines].count(True) for text in (views, model)] == [1, 1]


def test_brackets_are_text(capsys):
    """A name of an extra, or a folder [like this], is no markup."""
    journal = Journal(World())
    journal.say("auto: DALI is not installed (pip install nvidia-dali-cuda120)")
    journal.warn("no [/photos] here")
    assert capsys.readouterr().out == (
        "auto: DALI is not installed (pip install nvidia-dali-cuda120)\nwarning: no [/photos] here\n"
    )


def test_durations():
    texts = {0: "0:00", 59.6: "1:00", 61: "1:01", 3599: "59:59", 3661: "1:01:01", 90000: "25:00:00"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


def test_metrics_never_hold_nan_or_infinity_and_are_cut_where_told(tmp_path):
    config = load_config("quickstart", [f"run.dir={tmp_path}"])
    folder = RunFolder(config, run_path(config), pytest.fail)
    folder.open({})
    folder.write_header()
    state = folder.metrics_state()
    assert state == {"size": folder.metrics_path.stat().st_size, "pending": []}
    folder.write({"kind": "train", "loss": float("nan"), "lr": float("inf"), "step": 1})
    text = folder.metrics_path.read_text()
    assert json.loads(text.splitlines()[1]) == {"kind": "train", "loss": None, "lr": None, "step": 1}
    folder.restore_metrics(state)
    assert folder.metrics_path.read_text() == text.splitlines()[0] + "\n"
    folder.close()


def test_a_fresh_run_takes_a_new_folder(tmp_path):
    fresh = load_config("quickstart", [f"run.dir={tmp_path}", "run.name=run", "run.fresh=true"])
    assert run_path(fresh) == tmp_path / "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert run_path(fresh) == tmp_path / "run-3"
    assert run_path(load_config("quickstart", [f"run.dir={tmp_path}", "run.name=run"])) == tmp_path / "run"


def test_a_run_speaks_after_its_first_step_whatever_is_logged(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny("train.epochs=1", "train.log_every_steps=1000", "data.val=null")]) == 0
    said = capsys.readouterr().out
    assert [f"  step {step}/10  loss " in said for step in (1, 2, 10)] == [True, False, True]
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [10]
    assert all(KINDS[line["kind"]].__required_keys__ <= line.keys() for line in lines)
