"""What torchrun makes of a run: a worker that is killed, a job that is asked to stop, ranks that hang."""

import contextlib
import json
import os
import signal
import subprocess

import pytest
import torch

from fastsiam.run.checkpoint import load_newest
from fastsiam.train import main
from tests.support.processes import torchrun
from tests.support.runs import EVERY_STEP, assert_same_run, lines, wait_for_step

pytestmark = pytest.mark.slow


def workers(process):
    """Process ids of the ranks in their order."""
    found = {}
    for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            environment = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
            if b"LOCAL_RANK" in environment:
                found[int(environment[b"LOCAL_RANK"])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def slow(tiny):
    """Three epochs of 5 steps on two ranks, 0.1 to 0.2 s a step."""
    slower = ("train.epochs=3", "views.size=32", "model.width=16", "train.batch_size=16")
    return lambda name, *more: tiny(*slower, f"run.name={name}", *more)


def test_a_job_whose_workers_are_killed_ends_with_the_weights_of_an_undisturbed_one(slow, tmp_path):
    runs = tmp_path / "runs"
    with torchrun(*slow("whole")) as whole:
        said, errors = whole.communicate(timeout=120)
        assert whole.returncode == 0, errors
    with torchrun(*slow("killed", EVERY_STEP)) as job:
        wait_for_step(job, runs / "killed", 3)
        os.kill(workers(job)[0], signal.SIGKILL)
        said, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert " [lost-rank]\n" in errors
    assert status(runs / "killed")["code"] == "lost-rank"
    # The kill may have come while checkpoint.pt was made checkpoint.1.pt.
    before = load_newest(runs / "killed", warn=pytest.fail)["state"]["step"]
    assert before >= 3 - 1
    with torchrun(*slow("killed", EVERY_STEP), restarts=3) as job:
        wait_for_step(job, runs / "killed", 8)
        os.kill(workers(job)[1], signal.SIGKILL)
        said, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
    assert said.count("resume    at step") == 2
    assert "done      15 steps" in said
    assert_same_run(runs / "whole", runs / "killed")
    assert status(runs / "killed")["status"] == "done"


def test_one_asked_worker_stops_all_with_one_checkpoint_and_no_restart(slow, tmp_path):
    folder = tmp_path / "runs/asked"
    # With decoding processes: torchrun signals them, too.
    overrides = slow("asked", "checkpoint.every_seconds=1000", "data.backend=pil", "data.val=null")
    with torchrun(*overrides, restarts=3) as job:
        wait_for_step(job, folder, 2)
        os.kill(workers(job)[1], signal.SIGUSR1)
        said, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert said.count("stopped   at step") == 1
    left = status(folder)
    assert left["status"] == "preempted"
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint.pt"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"] == left["step"] < 15
    # The agent passes on what it gets: SIGTERM, and the Ctrl-C of a terminal.
    for number in (signal.SIGTERM, signal.SIGINT):
        with torchrun(*overrides) as job:
            wait_for_step(job, folder, status(folder)["step"] + 1)
            job.send_signal(number)
            said, errors = job.communicate(timeout=120)
        assert "stopped   at step" in said, errors
        assert status(folder)["status"] == "preempted"
    assert main(["--config", "quickstart", *overrides]) == 0
    steps = [line["step"] for line in lines(folder) if line["kind"] == "train"]
    assert steps == list(range(1, 16))


def test_ranks_that_hang_write_their_stacks_and_end_with_a_sentence(slow, tmp_path):
    folder = tmp_path / "runs/hangs"
    overrides = slow("hangs", "train.watchdog_seconds=10", "train.log_every_steps=1")
    with torchrun(*overrides, module="tests.support.hanging_train") as job:
        _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert " [stuck]\n" in errors
    assert "exitcode  : 5" in errors
    left = status(folder)
    assert (left["status"], left["code"]) == ("failed", "stuck")
    assert "in hang" in (folder / "stacks-rank1.txt").read_text()
    # The other rank waits for it in a collective.
    assert "Thread" in (folder / "stacks-rank0.txt").read_text()
    assert "fastsiam/train.py" in (folder / "stacks-rank0.txt").read_text()
