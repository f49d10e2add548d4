"""What a run advises where it waits for data: numbers in, one sentence or none out."""

import dataclasses
import json

import pytest
import torch

import fastsiam
from fastsiam.config import load_config
from fastsiam.data import bottleneck
from fastsiam.data.bottleneck import LoaderWatch, Loading, Window, advise, cpu_times, describe, window_of
from fastsiam.data.sources.open import open_source

BUSY = Window(wait_fraction=0.4, idle_cores=0.3, disk_cores=0.0)
LOADING = Loading(
    backend="dali",
    workers=4,
    cores=16,
    dali_installed=True,
    small_files=True,
    store_size=256,
    resident_bytes=10**9,
    free_bytes=10**10,
)


def action(window=BUSY, **changes):
    found = advise(dataclasses.replace(LOADING, **changes), window)
    return found and found.action


def test_below_a_tenth_nothing_is_said():
    assert action(Window(0.1, 12.0, 3.0)) is None
    assert action(Window(0.11, 12.0, 0.0)) is not None


@pytest.mark.parametrize(
    ("idle", "cores", "workers", "expected"),
    [
        (8.6, 16, 4, "set data.workers=12 (now 4)"),
        (14.0, 16, 4, "set data.workers=16 (now 4)"),
        (1.0, 5, 4, "set data.workers=5 (now 4)"),
        # Step and loader share the two cores of a small machine; idle ones that are not there do not count.
        (1.9, 2, 2, "set data.backend=resident data.store_size=256"),
        (1.9, 2, 3, "set data.backend=resident data.store_size=256"),
    ],
)
def test_idle_cores_get_workers_but_no_more_than_there_are(idle, cores, workers, expected):
    assert action(Window(0.4, idle, 0.0), cores=cores, workers=workers) == expected


def test_a_slow_disk_is_told_by_waiting_for_it():
    slow = Window(0.4, 10.0, 0.5)
    assert action(slow) == "pack them: python -m fastsiam.prepare pack"
    assert action(slow, small_files=False) == "store smaller images: python -m fastsiam.prepare ffcv"
    assert action(Window(0.4, 10.0, 0.4)) == "set data.workers=14 (now 4)"


def test_without_idle_cores_images_are_kept_or_made_smaller():
    assert action() == "set data.backend=resident data.store_size=256"
    assert action(resident_bytes=5 * 10**9 + 1) == "store smaller images: python -m fastsiam.prepare ffcv"


def test_pil_is_replaced_first():
    assert action(Window(0.4, 10.0, 2.0), backend="pil") == "set data.backend=dali"
    expected = "pip install nvidia-dali-cuda120, then set data.backend=dali"
    assert action(backend="pil", dali_installed=False) == expected


@pytest.mark.parametrize("backend", ["resident", "synthetic"])
def test_backends_that_decode_nothing_get_no_advice(backend):
    assert action(Window(0.9, 10.0, 2.0), backend=backend) is None


def test_idle_and_waiting_cores_are_counted_from_ticks():
    """User, nice, system, idle, iowait, irq, softirq, steal of two cores: one half idle, one a quarter for a disk.

    A third and a fourth were taken from the process and given to it meanwhile.
    """
    before = {"cpu0": [100, 0, 50, 1000, 10, 0, 0, 0], "cpu1": [5] * 8, "cpu2": [9] * 8}
    after = {"cpu0": [150, 0, 50, 1050, 10, 0, 0, 0], "cpu1": [65, 5, 20, 5, 30, 5, 5, 5], "cpu3": [99] * 8}
    assert window_of(0.2, before, after) == Window(0.2, idle_cores=0.5, disk_cores=0.25)
    now = cpu_times()
    assert all(len(ticks) == 8 for ticks in now.values())
    assert window_of(0.2, now, now) == Window(0.2, 0.0, 0.0)


def watch(monkeypatch, windows, loading=LOADING):
    """A watch whose windows of a minute have the given idle cores."""
    idle = iter(windows)
    monkeypatch.setattr(bottleneck, "window_of", lambda wait, before, after: Window(wait, next(idle), 0.0))
    return LoaderWatch(lambda: loading)


def test_a_minute_is_judged_and_told_once_until_it_changes(monkeypatch):
    watched = watch(monkeypatch, [8.0, 8.0, 3.0, 8.0])
    assert watched.add(20.0, 39.0) is None
    told = watched.add(0.0, 1.0)
    assert told == "33 % of the time is spent waiting for data: 8 of 16 cores are idle; set data.workers=12 (now 4)"
    assert watched.add(50.0, 10.0) is None
    assert watched.add(50.0, 10.0).endswith("set data.workers=7 (now 4)")
    assert watched.add(50.0, 10.0).endswith("set data.workers=12 (now 4)")


def test_a_good_minute_asks_nothing(monkeypatch):
    watched = watch(monkeypatch, [8.0, 8.0], loading=None)
    assert watched.add(6.0, 54.0) is None


def test_a_run_is_described_by_its_files_and_memory(tiny_config, photos):
    source = open_source(str(photos))
    found = describe(tiny_config("data.workers=3", "views.size=224"), source, "dali", torch.device("cpu"))
    assert (found.backend, found.workers, found.small_files) == ("dali", 3, True)
    assert found.resident_bytes == 16 * 3 * 256**2
    assert 1 << 26 < found.free_bytes < 1 << 50
    assert found.cores == len(cpu_times())


def test_a_run_that_waits_says_so_once_in_its_metrics(tiny, tmp_path, monkeypatch, capsys):
    """Every window counts as a minute, and all of the time as waiting."""
    monkeypatch.setattr(bottleneck, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(bottleneck, "window_of", lambda wait, before, after: BUSY)
    overrides = tiny("train.max_steps=4", "data.val=null", "data.backend=pil", "data.workers=0")
    fastsiam.pretrain(load_config("quickstart", overrides))
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    warnings = [line["message"] for line in lines if line["kind"] == "warning"]
    expected = (
        "40 % of the time is spent waiting for data: PIL decodes and crops several times as slowly as DALI; "
        "set data.backend=dali"
    )
    assert warnings == [expected]
    assert f"warning: {expected}" in capsys.readouterr().out
