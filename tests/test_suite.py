"""The suite's process, and the images it hands out."""

import importlib
import inspect
import json

import pytest

from benchmarks import images, suite
from benchmarks.suite import Benchmark, main

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


def test_the_next_ones_pay_for_one_that_takes_too_long(scripts, tmp_path, monkeypatch):
    clock = iter((0.0, 0.0, 90.0, 90.0, 90.0))
    monkeypatch.setattr(suite.time, "perf_counter", lambda: next(clock))
    assert scripts(Benchmark("loss", 0.25), Benchmark("other", 0.75), loss=GOOD, other=GOOD) == 0
    arguments = json.loads((tmp_path / "out/other.jsonl").read_text())["arguments"]
    # Two minutes less the minute and a half that the first one took.
    assert float(arguments["minutes"]) == 0.5


def test_one_that_fails_fails_the_suite_and_the_others_run(scripts, tmp_path, capfd):
    raises = GOOD + "raise RuntimeError('the kernel is wrong')\n"
    benchmarks = [Benchmark(name, 0.25) for name in ("loss", "other", "silent", "last")]
    assert scripts(*benchmarks, loss=raises, other="import os; os.abort()", silent="", last=GOOD) == 1
    printed = capfd.readouterr()
    assert "RuntimeError: the kernel is wrong" in printed.err
    assert printed.err.splitlines()[-1] == (
        "benchmarks: failed: loss (exit code 1), other (exit code -6), silent (no result lines)"
    )
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["last.jsonl", "loss.failed"]


def test_one_that_hangs_is_stopped(scripts, monkeypatch, capfd):
    monkeypatch.setattr(suite, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(suite, "_OVERRUN", 0)
    assert scripts(Benchmark("hangs", 1.0), hangs="import time; time.sleep(600)") == 1
    assert "hangs (stopped after 0 s)" in capfd.readouterr().err


def test_results_are_not_mixed(scripts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.jsonl").write_text("")
    assert scripts(Benchmark("loss", 1.0), loss=GOOD) == 2
    assert "already holds results of loss" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match=r"holds no file that ends in \.jpg"):
        images.photographs(tmp_path, tmp_path, 1)
