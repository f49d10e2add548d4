"""benchmarks.loader and benchmarks.end_to_end: what a sample holds, counted and computed, never timed."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import types

import pytest
import torch

from benchmarks import end_to_end, loader
from benchmarks.end_to_end import EndToEnd, in_turns
from benchmarks.harness import timing
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.loader import Case, Row, cpu_seconds, decoded_twice, files_of, ours, peer, source_of
from benchmarks.peers import AbsentError, authors
from fastsiam.data import decode
from fastsiam.data.backends.choose import dali_installed

CPU = torch.device("cpu")


@pytest.fixture
def case(photos):
    """15 JPEGs as 24 images of 16 px, in batches of 8, decoded in this process."""
    files = files_of(photos)
    return Case(tuple(files[index % len(files)] for index in range(24)), "photos", 16, 0, 8, CPU)


def test_files_are_the_jpegs_and_repeat_to_a_full_sample(photos):
    files = files_of(photos)
    assert len(files) == 15
    assert all(os.path.isabs(path) and path.endswith(".jpg") for path in files)
    source = source_of((*files, *files[:5]))
    assert [str(source.path(index)) for index in range(len(source))] == [*files, *files[:5]]
    full, *others = loader.cases(files, "photos", CPU)
    assert [len(one.paths) for one in (full, *others)] == [256 * one.workers for one in (full, *others)]
    assert full.workers == len(os.sched_getaffinity(0))
    assert others[-1].size == loader.SMALL_SIZE
    assert full.paths[:30] == (*files, *files)
    assert full.params["images"] % full.batch_size == 0


@pytest.mark.parametrize("backend", ["dali", "pil"] if dali_installed() else ["pil"])
@pytest.mark.parametrize("build", [ours, decoded_twice])
def test_an_epoch_delivers_every_image(case, backend, build):
    case = case if backend == "pil" else Case(**{**case.__dict__, "workers": 1})
    epoch, description = build(case, backend)
    assert [epoch(0), epoch(1)] == [24, 24]
    assert description.startswith(backend)


def test_dalis_own_augmentation_delivers_every_image(case):
    rows = loader.builders(CPU, None)
    for name in ("dali, its own augmentation", "dali, its own augmentation, bf16"):
        epoch, description = rows[name](dataclasses.replace(case, workers=1))
        assert epoch(0) == 24
        assert description.endswith("augmented by DALI")


@pytest.mark.parametrize("name", ["ffcv matrix", "resident matrix"])
def test_prepared_images_are_read_from_a_folder_that_goes_with_the_row(case, name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    epoch, description = loader.builders(CPU, None)[name](dataclasses.replace(case, workers=1))
    assert [epoch(0), epoch(1)] == [24, 24]
    assert description.startswith(name.partition(" ")[0])
    assert len(list(tmp_path.iterdir())) == 1
    del epoch
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_decoding_twice_is_what_it_says(case, monkeypatch):
    decoded, real = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *arguments: decoded.append(arguments[0]) or real(*arguments))
    ours(case, "pil")[0](0)
    assert len(decoded) == 24
    decoded_twice(case, "pil")[0](0)
    assert len(decoded) == 24 + 48


def test_a_peers_epoch_counts_images_not_views(case):
    epoch, _ = peer(case, authors.build_loader)
    assert [epoch(0), epoch(1)] == [24, 24]


def test_a_loader_that_drops_images_is_not_timed():
    row = Row("short", 24, lambda index: 16)
    with pytest.raises(RuntimeError, match="16 of 24"):
        row(0)


def test_cpu_seconds_counts_children_before_and_after_they_end():
    """A child that works for 0.3 s of CPU time; its parent does not."""
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        living = cpu_seconds() - before
        child.communicate(b"\n")
    reaped = cpu_seconds() - before
    assert 0.28 <= living < 1.0
    assert living - 0.05 <= reaped < 1.0


def test_lines_hold_rates_and_what_is_absent(case, tmp_path):
    def missing(case):
        raise AbsentError("pip install something")

    epochs = lambda case: (lambda index: 24, "words")  # noqa: E731
    loader.measure(Results(tmp_path, CPU), case, {"a": epochs, "b": missing}, seconds=0)
    a, b = map(json.loads, (tmp_path / "loader.jsonl").read_text().splitlines())
    assert a["images_per_second"] == pytest.approx(24 / a["median_seconds"])
    assert a["cpu_seconds_per_image"] >= 0
    assert (a["description"], len(a["samples_seconds"])) == ("words", 3)
    assert (b["variant"], b["absent"], b["samples_seconds"]) == ("b", "pip install something", [])
    assert a["params"] == b["params"] == case.params


def test_cpu_seconds_are_those_of_the_timed_epochs():
    """The warm-up's, in which code is compiled, are left out."""
    row = Row("a", 24, lambda index: 24)
    row.cpu_seconds = [100.0, 1.0, 2.0, 6.0]
    assert loader.cpu_seconds_per_image(row, rounds=3) == 2.0 / 24


class FakeRun:
    """Loader and loop on a clock of their own: batches take 2 s, the first one 30 s, steps 5 s."""

    steps_per_epoch = 4

    def __init__(self, monkeypatch):
        self.now, self.steps = 0.0, 0
        data = types.SimpleNamespace(runtime=types.SimpleNamespace(device=CPU))
        self.parts = types.SimpleNamespace(data=data, step=self.step)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def epoch(self, _number):
        for number in range(4):
            self.now += 2.0 if number else 30.0
            yield types.SimpleNamespace(views=None)

    def step(self, _views, _number):
        self.now += 5.0

    def __call__(self):
        self.now += 5.0 + (2.0 if self.steps % 4 else 30.0)
        self.steps += 1


def test_end_to_end_times_steps_after_the_first(monkeypatch):
    run = FakeRun(monkeypatch)
    ways = EndToEnd(run, run)
    assert ways.loader(0) == (30 + 3 * 2) / 4
    assert ways.step(0) == 5
    assert ways.end_to_end(0) == 2 + 5
    assert run.steps == 4


def test_turns_rotate_and_begin_untimed():
    calls = []

    def way(name):
        return lambda number: calls.append(name) or float(number)

    taken = in_turns({name: way(name) for name in "abc"}, seconds=0)
    assert "".join(calls) == "abcabcbcacab"
    assert {name: samples.seconds for name, samples in taken.items()} == dict.fromkeys("abc", (1.0, 2.0, 3.0))


@pytest.mark.parametrize(("loader_seconds", "limit", "share"), [(2.0, "step", 0.5), (8.0, "loader", 0.8)])
def test_the_slower_of_loader_and_step_is_the_limit(tiny_config, tmp_path, loader_seconds, limit, share):
    seconds = {"loader": loader_seconds, "step": 5.0, "end to end": 10.0}
    taken = {name: Samples((value,)) for name, value in seconds.items()}
    end_to_end.report(Results(tmp_path, CPU), tiny_config(), "words", "photos", taken)
    found = [json.loads(line) for line in (tmp_path / "end_to_end.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in found] == [8 / value for value in seconds.values()]
    assert (found[-1]["limit"], found[-1]["share_of_limit"]) == (limit, pytest.approx(share))


def test_end_to_end_trains_on_the_files(tiny_config, photos, tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(tiny_config().to_yaml())
    monkeypatch.setattr(end_to_end, "CONFIG", str(tmp_path / "tiny.yaml"))
    monkeypatch.setattr(end_to_end, "BATCH", {"cpu": 4})
    end_to_end.run(Results(tmp_path, CPU), device=CPU, minutes=0, images=photos)
    found = [json.loads(line) for line in (tmp_path / "end_to_end.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in found] == ["loader", "step", "end to end"]
    assert found[0]["params"] == {"encoder": "cifar_resnet8", "size": 16, "batch": 4, "photographs": photos.name}
    for line in found:
        assert line["images_per_second"] == pytest.approx(4 / line["median_seconds"])
        assert len(line["samples_seconds"]) == 3
