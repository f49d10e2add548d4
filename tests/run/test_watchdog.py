"""A run that hangs ends by itself, and its stacks say where; one that moves hears nothing."""

import faulthandler
import threading
import time

from fastsiam.errors import ExitCode
from fastsiam.run.watchdog import Watchdog
from tests.support.processes import run_python

# `end` appends to a file: how often it was called, and with what.
RUN = """
import ctypes, sys, threading, time
from pathlib import Path
from fastsiam.run.watchdog import Watchdog

folder = Path(sys.argv[1])

def end(sentence):
    with open(folder / "status", "a") as file:
        file.write(sentence)

def hangs_asleep():
    time.sleep(200)

def hangs_with_the_lock():
    ctypes.PyDLL(None).sleep(200)

def hangs_in_another_thread():
    thread = threading.Thread(target=hangs_asleep)
    thread.start()
    thread.join()

with Watchdog(folder, 0.5, int(sys.argv[3]), end) as watch:
    watch.beat()
    globals()[sys.argv[2]]()
"""


def hang(folder, function, rank=0):
    began = time.monotonic()
    done = run_python("-c", RUN, folder, function, rank)
    assert time.monotonic() - began < 100, "it slept to the end"
    return done


def test_a_stuck_main_thread_is_named_and_ended(tmp_path):
    """With the stacks of all threads."""
    done = hang(tmp_path, "hangs_in_another_thread", rank=3)
    assert done.returncode == ExitCode.STUCK == 5
    stacks = (tmp_path / "stacks-rank3.txt").read_text()
    first = stacks.splitlines()[0]
    assert "rank 3, process " in first
    assert "no step for 0.5 s" in first
    assert "in hangs_asleep" in stacks
    assert "in hangs_in_another_thread" in stacks
    sentence = (tmp_path / "status").read_text()
    assert str(tmp_path / "stacks-rank3.txt") in sentence
    assert done.stderr == f"fastsiam: {sentence} [stuck]\n"


def test_a_main_thread_that_holds_the_lock_is_named_and_ended_and_earlier_stacks_stay(tmp_path):
    (tmp_path / "stacks-rank0.txt").write_text("Thread 0x1 (most recent call first):\n")
    assert hang(tmp_path, "hangs_with_the_lock").returncode == 1
    assert not (tmp_path / "status").exists(), "no Python thread can have run"
    before = (tmp_path / "stacks-rank0.txt").read_text()
    first, second, *_ = before.splitlines()
    assert first.startswith("Thread 0x1")
    assert "rank 0, process " in second
    assert "in hangs_with_the_lock" in before
    with Watchdog(tmp_path, 100, 0, refuse) as watch:
        assert (tmp_path / "stacks-rank0.txt").stat().st_size > len(before)
        watch.beat()
    assert (tmp_path / "stacks-rank0.txt").read_text() == before


def test_a_folder_that_cannot_be_written_does_not_keep_it(tmp_path):
    for function, code in (("hangs_asleep", ExitCode.STUCK), ("hangs_with_the_lock", 1)):
        done = hang(tmp_path / "absent", function)
        assert done.returncode == code
        assert f"in {function}" in done.stderr
        assert ("[stuck]" in done.stderr) == (code == ExitCode.STUCK)


def refuse(sentence):
    raise AssertionError(sentence)


def watchdog(tmp_path, monkeypatch, seconds):
    """A watchdog, and an event in place of the end of this process."""
    ended = threading.Event()
    monkeypatch.setattr(Watchdog, "_finish", lambda self: ended.set())
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *arguments, **keywords: None)
    return Watchdog(tmp_path, seconds, 0, refuse), ended


def test_beats_keep_it_silent_and_no_beats_do_not(tmp_path, monkeypatch):
    watch, ended = watchdog(tmp_path, monkeypatch, 1.0)
    with watch:
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            watch.beat()
            time.sleep(0.01)
        assert not ended.is_set()
        assert ended.wait(60)
    assert list(tmp_path.iterdir()) == [], "a run that did not hang leaves no file"


def test_a_pause_is_not_watched_and_the_clock_starts_anew(tmp_path, monkeypatch):
    watch, ended = watchdog(tmp_path, monkeypatch, 2.0)
    with watch:
        with watch.paused():
            with watch.paused():
                time.sleep(2.5)
            time.sleep(2.5)
        time.sleep(1.0)
        assert not ended.is_set()
        assert ended.wait(60)


def test_outside_nothing_is_armed(tmp_path, monkeypatch):
    """After the context neither the thread nor the timer of faulthandler is left; a week or a century are no error."""
    armed = []
    real_later, real_cancel = faulthandler.dump_traceback_later, faulthandler.cancel_dump_traceback_later
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *a, **k: (armed.append(1), real_later(*a, **k)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: (armed.append(0), real_cancel()))
    with Watchdog(tmp_path, 1e15, 0, refuse) as watch:
        assert armed == [1]
        with watch.paused():
            assert armed == [1, 0]
        assert armed == [1, 0, 1]
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert armed == [1, 0, 1, 0]
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_process_that_was_killed_leaves_nothing_that_stays(tmp_path):
    """Only stacks do: the line before them is of every process that is watched."""
    path = tmp_path / "stacks-rank0.txt"
    path.write_text("rank 0, process 1 on host, is watched\n")
    with Watchdog(tmp_path, 100, 0, refuse):
        assert path.read_text().count("is watched") == 1
    assert not path.exists()
