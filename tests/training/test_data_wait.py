"""What counts as waiting for data: the device's standing still, and no start-up."""

import itertools
import json
import time

import pytest
import torch

import fastsiam
from fastsiam.config import load_config
from fastsiam.data import bottleneck
from fastsiam.data.backends import pil
from fastsiam.training.data_wait import OnDevice, OnHost, data_wait_on
from fastsiam.training.state import State
from fastsiam.training.timing import Stopwatch
from tests.support.loaders import make


class Device:
    """A GPU in numbers: the host's clock, and until when the device has work, in seconds."""

    def __init__(self):
        self.now = self.busy_until = 100.0

    def enqueue(self, seconds):
        self.busy_until = max(self.busy_until, self.now) + seconds

    def event(self):
        return Place(self)


class Place:
    """An event without `synchronize`: who measures must not wait."""

    def __init__(self, device):
        self._device = device

    def record(self):
        self.time = max(self._device.now, self._device.busy_until)

    def query(self):
        return self.time <= self._device.now

    def elapsed_time(self, later):
        if not (self.query() and later.query()):
            raise RuntimeError("device not ready")
        return 1000 * (later.time - self.time)


def trained(monkeypatch, host_waits, step=0.1, other=0.0):
    """Seconds of wait and step of a run on `Device`; the host launches a step in 5 ms, a batch's crops take 1 ms."""
    device = Device()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    clock = Stopwatch(State(), OnDevice(device.event))
    for seconds in host_waits:
        device.now += seconds
        device.enqueue(0.001)
        clock.split("wait")
        device.now += 0.005
        device.enqueue(step)
        clock.split("step")
        device.now += other
        clock.split("other")
    device.now = max(device.now, device.busy_until)
    clock.split("step")
    waited, stepped = clock.so_far()
    assert waited + stepped + clock.totals["other"] == pytest.approx(device.now - 100.0)
    assert clock.totals["wait"] == waited
    return waited, stepped


def test_a_host_that_waits_while_the_device_works_is_not_waiting_for_data(monkeypatch):
    """Batches come every 60 ms, steps take 100 ms: the host waits most of its time, the device never."""
    assert trained(monkeypatch, [0.055] * 50)[0] == 0.0


def test_a_device_waits_from_the_end_of_a_step_to_the_next_batch(monkeypatch):
    """150 ms from batch to batch, 105 of which a step and its launch take; what the host waits is 145."""
    waited, stepped = trained(monkeypatch, [0.145] * 50)
    assert waited == pytest.approx(49 * (0.045 + 0.001))
    assert stepped == pytest.approx(50 * 0.15 + 0.1 - waited)


def test_what_the_host_does_otherwise_is_not_waiting_for_data(monkeypatch):
    """A second between steps, for a checkpoint: of that the batch, which takes 10 ms, is not guilty."""
    assert trained(monkeypatch, [0.01] * 20, other=1.0)[0] == pytest.approx(19 * 0.01)


def test_a_cpu_waits_as_long_as_its_host(monkeypatch):
    now = itertools.count(0.0, 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Stopwatch(State(), data_wait_on(torch.device("cpu")))
    for name in ("other", "wait", "step", "wait", "step", "step"):
        clock.split(name)
    assert isinstance(clock._data_wait, OnHost)
    assert clock.so_far() == (2.0, 3.0)


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_a_batch_is_cold_where_its_backend_had_to_start(photos, backend):
    made = make(photos, backend)

    def cold(epoch, count=None, **options):
        batches = made.epoch(epoch, **options)
        found = [batch.cold for batch in itertools.islice(batches, count)]
        batches.close()
        return found

    assert cold(0) == [True, False, False]
    assert cold(1) == [False, False, False]
    made.close()
    assert cold(1, count=2) == [True, False]
    assert cold(1) == [True, False, False]
    assert cold(1, sizes=(16,)) == [True, False, False]
    assert cold(1, sizes=(16,)) == [False, False, False]


def test_a_slow_start_is_neither_waiting_nor_part_of_a_minute(tiny, tmp_path, monkeypatch):
    """A second before the first batch, and again after an evaluation, for which the training decoders are closed."""
    real, starts, ticks = pil.PilBackend._build, [], []

    def slow(backend):
        starts.append(backend)
        time.sleep(1)
        return real(backend)

    monkeypatch.setattr(pil.PilBackend, "_build", slow)
    monkeypatch.setattr(bottleneck, "cpu_times", lambda: ticks.append(len(starts)) or {})
    fastsiam.pretrain(load_config("quickstart", tiny("data.backend=pil", "data.workers=0")))
    metrics = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if line["kind"] == "train"]
    assert starts.count(starts[0]) == 2
    assert sum(8 / line["images_per_second"] * line["data_wait_fraction"] for line in lines) < 1
    assert ticks == [0, 1]
