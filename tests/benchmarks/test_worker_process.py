"""Second processes end with what started them; this file imports no torch, so that they start quickly."""

import os
import time

import pytest

from benchmarks.harness.worker_process import Aside
from tests.support.processes import run_python


def build(name, start, stack):
    """Builds numbers of one name, which may be wrong."""
    if name == "dies":
        os._exit(3)
    stack.callback(print, f"{name} ends", flush=True)
    return lambda index: [start][index]


def test_a_row_aside_runs_there_and_its_errors_end_it(capfd):
    with Aside(build, 5) as aside:
        step = aside.bind("row")
        assert step(0) is None
        assert step(0) is None
    assert capfd.readouterr().out == "row ends\n"
    with Aside(build, 5) as aside:
        step = aside.bind("row")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="code 1$"):
                step(1)
    assert "IndexError" in capfd.readouterr().err
    with Aside(build, 5) as aside, pytest.raises(RuntimeError, match="code 3$"):
        aside.bind("dies")


def test_a_process_that_nobody_asks_is_not_started():
    with Aside(build, 5) as aside:
        pass
    assert aside._process.pid is None


SLEEPER = """
import os, sys, time
from benchmarks.harness.worker_process import apart

def sleep():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    apart(sleep)
"""


def test_a_process_apart_ends_with_a_killed_parent(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    with run_python(tmp_path / "sleeper.py", wait=False) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
