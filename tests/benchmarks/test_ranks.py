"""Processes of a benchmark of several ranks take turns and end together; few imports, so that they start quickly."""

import fcntl
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmarks.harness import ranks as ranks_module
from benchmarks.harness.ranks import in_ranks, in_turns
from benchmarks.harness.timing import Samples
from fastsiam.runtime.distributed import World
from tests.support.gloo_ranks import world
from tests.support.processes import REPOSITORY

CPU = torch.device("cpu")


def turns_of_a_rank():
    called = []
    functions = {name: (lambda index, name=name: called.append((name, index))) for name in "abc"}
    taken = in_turns(world(), CPU, functions, together=2, warmup=1, repeats=3)
    return called, taken and {name: len(samples.seconds) for name, samples in taken.items()}


def test_ranks_take_turns_as_the_first_one_says(ranks):
    (first, taken), (second, nothing) = ranks(2, turns_of_a_rank)
    assert first == second
    assert first[::2] == [
        ("a", 0), ("b", 0), ("c", 0),
        ("a", 2), ("b", 2), ("c", 2),
        ("b", 4), ("c", 4), ("a", 4),
        ("c", 6), ("a", 6), ("b", 6),
    ]  # fmt: skip
    assert first[1::2] == [(name, index + 1) for name, index in first[::2]]
    assert (taken, nothing) == ({"a": 3, "b": 3, "c": 3}, None)


def slow_rank():
    """Two calls a sample, of which the second rank's take 0.05 s each."""
    mine = world()
    taken = in_turns(mine, CPU, {"a": lambda index: time.sleep(0.05 * mine.rank)}, together=2, warmup=1, repeats=3)
    return taken and taken["a"].median


def test_a_sample_ends_with_the_slowest_rank(ranks):
    seconds, _ = ranks(2, slow_rank)
    assert seconds > 0.05


def test_samples_are_seconds_a_call(monkeypatch):
    monkeypatch.setattr(
        ranks_module, "interleave", lambda functions, **_: dict.fromkeys(functions, Samples((6.0, 9.0)))
    )
    assert in_turns(World(), CPU, {"a": print}, together=3) == {"a": Samples((2.0, 3.0))}


def fails_on_the_second(world):
    if world.rank == 1:
        raise IndexError("nothing there")
    world.barrier()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        in_ranks(2, "cpu", fails_on_the_second)


def wait_for_ever(world, folder):
    """Holds a lock on a file, which ends with the process."""
    with open(folder / str(world.rank), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("locked")
        file.flush()
        threading.Event().wait()


KILLED = """
import sys, pathlib
from benchmarks.harness.ranks import in_ranks
from tests.benchmarks.test_ranks import wait_for_ever
in_ranks(2, "cpu", wait_for_ever, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_ranks_of_a_killed_benchmark_end(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=REPOSITORY)
    wait_until(lambda: {path.name for path in tmp_path.iterdir() if path.read_text() == "locked"} == {"0", "1"})
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_locked(path) for path in tmp_path.iterdir()))


def is_locked(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(reached):
    deadline = time.monotonic() + 100
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
