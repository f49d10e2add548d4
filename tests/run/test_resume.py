"""A run that is stopped, killed or damaged goes on exactly where it was."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

import fastsiam
from fastsiam.config import load_config
from fastsiam.run.stop_signals import StopSignals
from fastsiam.train import main, opened
from tests.support.processes import REPOSITORY, run_python
from tests.support.refusals import refused
from tests.support.runs import EVERY_STEP, assert_same_run, lines, refused_unwritten, start, wait_for_step, weights


@pytest.fixture
def long(tiny):
    """Three epochs of 10 steps, slow enough to be hit in mid-epoch: 50 ms a step."""
    slower = ("train.epochs=3", "views.size=32", "model.width=16", "evaluate.controls=true")
    return lambda name, *more: tiny(*slower, f"run.name={name}", *more)


@pytest.mark.slow
def test_killed_twice_in_mid_epoch_it_ends_as_if_undisturbed(long, tmp_path):
    runs = tmp_path / "runs"
    assert main(["--config", "quickstart", *long("whole")]) == 0
    for step in (3, 16):
        process = start(long("killed", EVERY_STEP))
        wait_for_step(process, runs / "killed", step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert json.loads((runs / "killed/status.json").read_text())["status"] == "running"
    last = long("killed", "checkpoint.every_seconds=1000")
    done = run_python("-m", "fastsiam.train", "--config", "quickstart", *last)
    assert done.returncode == 0, done.stderr
    resumed = [line["step"] for line in lines(runs / "killed") if line["kind"] == "resume"]
    assert len(resumed) == 2
    assert 2 <= resumed[0] < resumed[1] < 30
    assert_same_run(runs / "whole", runs / "killed")


@pytest.mark.slow
def test_a_signal_saves_and_ends_and_the_same_command_goes_on(long, tmp_path):
    folder, step = tmp_path / "runs/stopped", 1
    overrides = long("stopped", "evaluate.controls=false", "checkpoint.every_seconds=1000")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)):
        process = start(overrides)
        wait_for_step(process, folder, step + 3)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Ctrl-C now ends at once" in errors
        status = json.loads((folder / "status.json").read_text())
        step = status["step"]
        assert status["status"] == "preempted"
        assert f"stopped   at step {step} with a checkpoint" in said
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"] == step < 30
    assert main(["--config", "quickstart", *overrides]) == 0
    assert main(["--config", "quickstart", *long("whole", "evaluate.controls=false")]) == 0
    stopped = [line for line in lines(folder) if line["kind"] == "end"]
    assert [line["status"] for line in stopped] == ["done"]
    assert_same_run(tmp_path / "runs/whole", folder)


def handlers(*numbers):
    return [signal.getsignal(number) for number in numbers]


SIGNALLED = """
import os, signal, sys, time
from fastsiam.run.stop_signals import StopSignals
with StopSignals(abandon=lambda: print("in order", flush=True)) as stop:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), signal.Signals["SIG" + name])
        time.sleep(0.3)
    print("goes on", stop.received)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "code"),
    [("INT INT", 130), ("TERM INT", 130), ("USR1 USR1 INT", 130), ("INT TERM", 130), ("TERM TERM USR1", 0)],
)
def test_a_ctrl_c_after_another_signal_ends_at_once(names, code):
    """A scheduler and torchrun may both send SIGTERM; of a second Ctrl-C torchrun makes a SIGTERM."""
    done = run_python("-c", SIGNALLED, *names.split())
    assert (done.returncode, done.stdout) == (code, "in order\n" if code else "goes on 15\n")
    assert done.stderr.count("Ctrl-C now ends at once") == 1


def test_handlers_are_as_before_afterwards():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = handlers(*numbers)
    for first in numbers:
        with StopSignals(speaks=False) as stop:
            os.kill(os.getpid(), first)
            assert stop.received == first
        assert handlers(*numbers) == before
        assert signal.set_wakeup_fd(-1) == -1


def test_a_notebook_hears_that_it_stops(monkeypatch):
    """Its stderr has no file descriptor; the thread that listens must live for the second Ctrl-C."""
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while "with a checkpoint" not in stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "with a checkpoint" in stderr.getvalue()
        assert stop.received == signal.SIGTERM
        assert [thread.name for thread in threading.enumerate()].count("signals") == 1


STUCK = """
import sys, time
from fastsiam.train import main
from fastsiam.training.step import TrainingStep
step = TrainingStep.__call__
def stuck(self, views, number, indices, progress):
    if number == 4:
        print("stuck", flush=True)
        time.sleep(300)
    return step(self, views, number, indices, progress)
TrainingStep.__call__ = stuck
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_things_in_order_where_the_run_is_stuck(tiny, tmp_path):
    """In a terminal: its cursor is shown again, the status is not running, and nothing claims a hang."""
    folder, (terminal, inner) = tmp_path / "runs/run", pty.openpty()
    stale = folder / "stacks-rank0.txt"
    overrides = tiny("data.val=null")
    command = [sys.executable, "-c", STUCK, "--config", "quickstart", *overrides]
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdout=inner, stderr=inner, stdin=inner, env=environment)
    os.close(inner)
    shown = b""
    while b"stuck" not in shown:
        shown += os.read(terminal, 4096)
    assert stale.exists()
    process.send_signal(signal.SIGINT)
    while b"Ctrl-C now" not in shown:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    assert b"decoding the first batch" in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") > 0
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["step"], status["code"]) == ("failed", 3, "second-interrupt")
    assert not stale.exists()
    # Of an earlier hang, of a rank that is no more, and of a process that was killed.
    stale.write_text("no step for 600 s\nThread 0x1 (most recent call first):\n")
    (folder / "stacks-rank7.txt").write_text("Thread 0x1 (most recent call first):\n")
    assert main(["--config", "quickstart", *overrides]) == 0
    assert list(folder.glob("stacks*")) == []


def test_a_finished_run_says_so_and_more_steps_go_on(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny("train.max_steps=7")]) == 0
    first = (tmp_path / "runs/run/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert main(["--config", "quickstart", *tiny("train.max_steps=7")]) == 0
    said = capsys.readouterr().out
    assert "is finished: step 7" in said
    assert (tmp_path / "runs/run/checkpoint.pt").read_bytes() == first
    assert main(["--config", "quickstart", *tiny("data.val=null")]) == 0
    assert main(["--config", "quickstart", *tiny("data.val=null", "run.name=whole")]) == 0
    torch.testing.assert_close(weights(tmp_path / "runs/run"), weights(tmp_path / "runs/whole"), rtol=0, atol=0)


def test_a_truncated_checkpoint_is_told_and_the_one_before_it_serves(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny(EVERY_STEP, "train.max_steps=13")]) == 0
    folder = tmp_path / "runs/run"
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    assert main(["--config", "quickstart", *tiny("checkpoint.every_seconds=1000")]) == 0
    said = capsys.readouterr().out
    assert "resume    at step 13" in said or "resume    at step 12" in said
    assert "damaged-checkpoint" in [line.get("code") for line in lines(folder) if line["kind"] == "warning"]
    assert main(["--config", "quickstart", *tiny("run.name=whole")]) == 0
    torch.testing.assert_close(weights(folder), weights(tmp_path / "runs/whole"), rtol=0, atol=0)
    for path in folder.glob("checkpoint*.pt"):
        path.write_bytes(b"PK")
    assert refused("train", "--config", "quickstart", *tiny()).code == "no-whole-checkpoint"


def test_other_data_views_or_backend_are_refused(tiny, tmp_path, capsys, photos):
    assert main(["--config", "quickstart", *tiny("train.max_steps=2")]) == 0

    def code(*overrides):
        return refused_unwritten(capsys, tmp_path, *tiny("data.val=null", *overrides)).code

    assert code(f"data.train={photos}") == "other-data"
    assert code("views.blur=0.5") == "other-config"
    assert code("data.backend=pil") == "other-backend"
    saved = torch.load(tmp_path / "runs/run/checkpoint.pt", weights_only=True)
    for key in ("backend", "views"):
        torch.save({**saved, "identity": saved["identity"] | {key: "pil"}}, tmp_path / "runs/run/checkpoint.pt")
        assert code() == f"other-{key}"
    newer = {"layout": saved["layout"] + 1}, {"state": saved["state"] | {"unheard_of": 1}}
    for written in ({"layout": 2}, *newer):
        torch.save(saved | written, tmp_path / "runs/run/checkpoint.pt")
        assert code() == "other-version"
    (tmp_path / "runs/run/config.yaml").write_text("views: {unheard_of: 1}\n")
    assert code() == "damaged-config"


def test_a_run_of_the_sampled_blur_goes_on_with_it_when_the_recipe_means_pillows(tiny, tmp_path, capsys):
    recipe = tiny("views.recipe=simsiam", "train.max_steps=4")
    assert main(["--config", "quickstart", *recipe, "views.blur_kind=gaussian", "train.max_steps=2"]) == 0
    path = tmp_path / "runs/run/config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["views"]["blur_kind"]
    path.write_text(yaml.safe_dump(values))
    assert "; set views.blur_kind=gaussian " in str(refused_unwritten(capsys, tmp_path, *recipe))
    assert main(["--config", "quickstart", *recipe, "views.blur_kind=gaussian"]) == 0
    assert "resume    at step 2" in capsys.readouterr().out
    assert yaml.safe_load(path.read_text())["views"]["blur_kind"] == "gaussian"


def test_two_processes_cannot_train_in_one_folder(tiny):
    with opened(load_config("quickstart", tiny())):
        assert refused("train", "--config", "quickstart", *tiny()).code == "run-locked"
    assert fastsiam.pretrain(load_config("quickstart", tiny())).status == "done"
