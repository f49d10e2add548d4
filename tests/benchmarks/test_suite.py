"""The suite's process, and the images it hands out."""

import importlib
import inspect
import json
import re
import signal
import time
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.harness import images
from benchmarks.harness.checkout import CHECKOUT
from benchmarks.suite import Benchmark, Clock, main
from fastsiam.errors import UserError
from tests.support.processes import run_python

GOOD = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("out", "device", "minutes", "images"):
    parser.add_argument("--" + name)
arguments = vars(parser.parse_args())
name = pathlib.Path(__file__).stem
line = {"schema": 1, "benchmark": name, "variant": "eager", "params": {}, "arguments": arguments}
line |= {"samples_seconds": [0.5], "median_seconds": 0.5, "p20_seconds": 0.4, "p80_seconds": 0.6}
line["environment"] = {"cpu": "a CPU", "cores": 1, "threads": 1, "gpu": None, "commit": None, "date": "2026-01-01"}
with open(pathlib.Path(arguments["out"]) / (name + ".jsonl"), "w") as file:
    file.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch, photos):
    """A function that puts scripts in the place of the benchmarks, and runs the suite on them."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*benchmarks, **sources):
        for name, text in sources.items():
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(suite, "BENCHMARKS", benchmarks)
        return main(["--out", str(tmp_path / "out"), "--device", "cpu", "--minutes", "2", "--images", str(photos)])

    return run


def test_each_gets_its_share_and_its_options(scripts, tmp_path, photos, capfd):
    assert scripts(Benchmark("loss", 0.25), Benchmark("other", 0.75, ("images",)), loss=GOOD, other=GOOD) == 0
    found = {}
    for name in ("loss", "other"):
        found[name] = json.loads((tmp_path / "out" / f"{name}.jsonl").read_text())["arguments"]
    minutes = {name: float(arguments.pop("minutes")) for name, arguments in found.items()}
    shared = {"out": str(tmp_path / "out"), "device": "cpu"}
    assert found["loss"] == {**shared, "images": None}
    assert found["other"] == {**shared, "images": str(photos)}
    assert minutes["loss"] == pytest.approx(0.5, abs=0.01)
    # All that is left: loss has taken seconds of its half minute.
    assert 1.5 < minutes["other"] < 2
    printed = capfd.readouterr().out
    assert "loss: a CPU, 1 cores, 1 threads; n = 1; no commit; 2026-01-01." in printed
    assert "| eager | 500 [400, 600] | 1.00x |" in printed


TWO = (Benchmark("loss", 0.25), Benchmark("other", 0.75))


def test_the_next_ones_pay_for_one_that_takes_too_long():
    clock = Clock(began=0.0, minutes=2.0)
    assert clock.share(0.0, TWO) == 0.5
    # Two minutes less the minute and a half that the first one took.
    assert clock.share(90.0, TWO[1:]) == 0.5
    assert clock.share(200.0, TWO[1:]) == 0


def test_eight_minutes_fit_into_a_command_of_ten():
    """Each may overrun its share, and the last one is stopped in time whatever the others took."""
    clock, now = Clock(began=0.0, minutes=8.0), 0.0
    for number in range(len(suite.BENCHMARKS)):
        rest = suite.BENCHMARKS[number:]
        assert clock.limit(now, rest) > 60 * clock.share(now, rest)
        now += max(clock.limit(now, rest), 0)
    assert now < 9.5 * 60


def test_one_that_fails_fails_the_suite_and_the_others_run(scripts, tmp_path, capfd):
    raises = GOOD + "raise RuntimeError('the kernel is wrong')\n"
    benchmarks = [Benchmark(name, 0.25) for name in ("loss", "other", "silent", "last")]
    assert scripts(*benchmarks, loss=raises, other="import os; os.abort()", silent="", last=GOOD) == 1
    printed = capfd.readouterr()
    assert "RuntimeError: the kernel is wrong" in printed.err
    failed = re.findall(r"(\w+) \(", printed.err.splitlines()[-1])
    assert failed == ["loss", "other", "silent"]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["last.jsonl", "loss.failed"]


def test_one_that_hangs_is_stopped_with_its_processes_and_tables_are_written(scripts, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(suite, "_LEAST", 1.0)
    monkeypatch.setattr(suite, "_OVERRUN", 1.0)
    monkeypatch.setattr(suite, "_SHORTEST_SECONDS", 1.0)
    hangs = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    # Three seconds of two minutes.
    assert scripts(Benchmark("hangs", 0.025), Benchmark("loss", 0.975), hangs=hangs, loss=GOOD) == 1
    printed = capfd.readouterr()
    assert re.findall(r"(\w+) \(", printed.err.splitlines()[-1]) == ["hangs"]
    assert "loss: a CPU, 1 cores" in printed.out
    process = Path("/proc", (tmp_path / "child").read_text(), "stat")
    while process.exists() and process.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.05)


def test_one_for_which_there_is_no_time_is_not_begun(tmp_path):
    assert suite.run_one(TWO[0], tmp_path, 0.0, "cpu", {}, limit=2.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_suite_that_is_ended_prints_what_it_has(tmp_path, photos):
    """As `timeout` ends it; what was under way is put aside."""
    started = tmp_path / "started"
    (tmp_path / "loss.py").write_text(GOOD)
    (tmp_path / "slow.py").write_text(GOOD + f"open({str(started)!r}, 'w'); import time; time.sleep(600)")
    code = (
        "import signal, sys; from benchmarks import suite; from benchmarks.suite import *\n"
        "suite.BENCHMARKS = (Benchmark('loss', 0.5), Benchmark('slow', 0.5)); suite.end_on_sigterm()\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ("--out", tmp_path / "out", "--minutes", "2", "--images", photos)
    path = f"{tmp_path}:{CHECKOUT}"
    process = run_python("-c", code, *arguments, wait=False, PYTHONPATH=path)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "loss: a CPU, 1 cores" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss.jsonl", "slow.failed"]


def test_results_are_not_mixed(scripts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.jsonl").write_text("")
    assert scripts(Benchmark("loss", 1.0), loss=GOOD) == 2
    assert "[results-exist]" in capsys.readouterr().err


def test_shares_add_up_and_every_script_takes_its_options():
    assert sum(benchmark.share for benchmark in suite.BENCHMARKS) == pytest.approx(1)
    for benchmark in suite.BENCHMARKS:
        parameters = inspect.signature(importlib.import_module(benchmark.module).run).parameters
        assert {"results", "device", "minutes", *benchmark.options} <= set(parameters)
        given = {argument.removeprefix("--").replace("-", "_") for argument in benchmark.arguments[::2]}
        assert given <= set(parameters)
        # What the suite has and does not pass on: such an option would silently not apply.
        offered = {"images", "solo_learn", "ranks"} & set(parameters)
        assert offered - set(benchmark.options) == ({"solo_learn"} if benchmark.name == "time_to_accuracy" else set())


def test_drawn_images_are_a_function_of_their_index_and_weigh_as_photographs_do(tmp_path):
    root, label = images.photographs(None, tmp_path, 12)
    files = sorted(root.rglob("*.jpg"))
    assert (label, len(files), len(list(root.iterdir()))) == ("drawn", 12, 10)
    mean = sum(path.stat().st_size for path in files) / len(files)
    assert 100_000 < mean < 135_000
    before = {path: path.stat().st_mtime_ns for path in files}
    assert images.photographs(None, tmp_path, 12) == (root, "drawn")
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert (images.draw(3) == images.draw(3)).all()
    assert (images.draw(3) != images.draw(4)).mean() > 0.9
    assert images.photographs(root, tmp_path, 99) == (root, "drawn")


def test_a_folder_of_photographs_goes_by_its_name(photos, tmp_path):
    assert images.photographs(photos, tmp_path / "unused", 99) == (photos, photos.name)
    assert not (tmp_path / "unused").exists()
    with pytest.raises(UserError) as caught:
        images.photographs(tmp_path, tmp_path, 1)
    assert caught.value.code == "no-jpegs"
