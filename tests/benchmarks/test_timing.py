"""The protocol that every measurement goes through: order, statistics, limits, and what a line says."""

import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.harness import environment as environment_module
from benchmarks.harness import timing
from benchmarks.harness.environment import environment
from benchmarks.harness.results import SCHEMA, Results
from benchmarks.harness.timing import Samples, copy_bandwidth, interleave

CPU = torch.device("cpu")


@pytest.fixture
def small_cache(monkeypatch):
    """Overwriting the real one takes 10 ms a sample, and proves nothing here."""
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1024)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_statistics_are_those_of_the_sorted_samples():
    samples = Samples((11.0, 1.0, 6.0, 2.0, 10.0, 3.0, 9.0, 4.0, 8.0, 5.0, 7.0))
    assert (samples.p20, samples.median, samples.p80) == (3.0, 6.0, 9.0)
    raw = tuple(np.random.default_rng(0).exponential(size=37))
    expected = np.percentile(raw, [20, 50, 80])
    assert (Samples(raw).p20, Samples(raw).median, Samples(raw).p80) == pytest.approx(tuple(expected), rel=1e-12)
    assert Samples((2.5,)).p20 == Samples((2.5,)).p80 == 2.5
    with pytest.raises(ValueError, match="sample"):
        Samples(())


def test_variants_take_turns_and_count_their_own_calls(small_cache):
    called = []
    variants = {name: lambda i, name=name: called.append((name, i)) for name in "abc"}
    taken = interleave(variants, device=CPU, warmup=2, repeats=4, calls=2)
    warm, timed = called[:6], called[6:]
    assert warm == [(name, i) for name in "abc" for i in (0, 1)]
    assert [name for name, _ in timed[::2]] == list("abc" + "bca" + "cab" + "abc")
    for name in "abc":
        assert [i for other, i in called if other == name] == list(range(10))
    assert {name: len(samples.seconds) for name, samples in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_sample_is_seconds_per_call(small_cache, clock):
    def slow(i):
        clock.now += 1.0 if i < 3 else 0.25 * (1 + (i >= 7))

    taken = interleave({"slow": slow}, device=CPU, warmup=3, repeats=3, calls=4)
    assert taken["slow"].seconds == (0.25, 0.5, 0.5)


@pytest.mark.parametrize(("seconds", "rounds"), [(None, 20), (100.0, 20), (14.0, 5), (13.9, 4), (0.0, 3)])
def test_no_round_begins_that_would_end_too_late(small_cache, clock, seconds, rounds):
    """Warm-up takes 4 s, a round 2 s; three rounds are taken however late it is."""

    def one_second(i):
        clock.now += 1.0

    taken = interleave({"a": one_second, "b": one_second}, device=CPU, warmup=2, seconds=seconds)
    assert [len(samples.seconds) for samples in taken.values()] == [rounds, rounds]


def test_the_cache_is_overwritten_before_every_sample(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 100)
    timer = timing._HostTimer(CPU)
    found = []

    def look(i):
        found.append((timer._cache.numel(), timer._cache.sum().item()))
        timer._cache.fill_(1)

    timer.sample("a", look, 0, 1)
    timer.sample("a", look, 1, 1)
    assert found == [(200, 0), (200, 0)]


@pytest.mark.parametrize("hide", [True, False])
def test_the_host_enqueues_while_the_device_is_busy(monkeypatch, clock, hide):
    """What reaches the stream, in order, with a recording one in CUDA's place that spins at 1e9 cycles a second."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = sum(cycles for what, cycles in stream if what == "spin") / 1e9
            stream.append(("event", 0))

        def synchronize(self):
            stream.append(("wait", 0))

        def elapsed_time(self, end):
            return (end.at - self.at) * 1000

    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.append(("spin", cycles)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: stream.append(("wait", 0)))

    def kernel(i):
        clock.now += 0.001
        stream.append(("spin", 3_000_000))

    timer = timing._CudaTimer(CPU, hide)
    timer.warm_up("a", kernel, 2, calls=4)
    if hide:
        assert timer._spin_rate() == 1e9
    stream.clear()
    timer._cache.fill_(1)
    assert timer.sample("a", kernel, 2, calls=4) == pytest.approx(0.003)
    assert timer._cache.sum() == 0
    # Twice the 4 ms that the host took in warm-up.
    head = ("spin", 8_000_000) if hide else ("wait", 0)
    assert stream == [head, ("event", 0), *[("spin", 3_000_000)] * 4, ("event", 0), ("wait", 0)]


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"calls": 0}, {"warmup": 0}])
def test_nothing_to_time_is_an_error(wrong):
    with pytest.raises(ValueError, match="interleave"):
        interleave({"a": print}, device=CPU, **wrong)
    with pytest.raises(ValueError, match="interleave"):
        interleave({}, device=CPU)


def test_bandwidth_counts_bytes_read_and_written(small_cache, monkeypatch):
    monkeypatch.setattr(timing, "interleave", lambda variants, **_: {"copy": Samples((0.5, 0.25, 0.25))})
    assert copy_bandwidth(CPU, size=1000) == 8000.0


def test_a_line_survives_the_file(tmp_path, capsys):
    results = Results(tmp_path, CPU)
    params = {"batch": 4, "dtype": "fp32"}
    line = results.add("loss", "eager", params, Samples((0.004, 0.001, 0.002)), launches=None, ms=2.0)
    results.add("loss", "peer", params, None, absent="pip install peer")
    first, second = map(json.loads, (tmp_path / "loss.jsonl").read_text().splitlines())
    assert first == line
    assert first["schema"] == SCHEMA
    assert (first["benchmark"], first["variant"], first["params"]) == ("loss", "eager", params)
    assert first["samples_seconds"] == [0.004, 0.001, 0.002]
    assert first["median_seconds"] == 0.002
    assert (first["p20_seconds"], first["p80_seconds"]) == pytest.approx((0.0014, 0.0032))
    assert (second["samples_seconds"], second["median_seconds"], second["absent"]) == ([], None, "pip install peer")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "loss eager batch=4 dtype=fp32  2 ms [1.4, 3.2] n=3  ms=2"
    assert printed[1] == "loss peer batch=4 dtype=fp32 absent=pip install peer"


def test_a_number_that_is_none_of_finite_is_refused(tmp_path):
    results = Results(tmp_path, CPU)
    with pytest.raises(ValueError, match="JSON"):
        results.add("loss", "eager", {}, Samples((1.0,)), share=float("nan"))
    assert not (tmp_path / "loss.jsonl").exists()


def test_environment_of_a_cpu():
    found = environment(CPU)
    assert {found[key] for key in ("gpu", "driver", "power_limit_watts")} == {None}
    assert torch.__version__.startswith(found["torch"])
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]
    assert ("avx2" in found["isa"]) == ("AVX" in torch.backends.cpu.get_cpu_capability())
    assert environment_module.clocks(CPU) == {"sm_clock_mhz": None, "memory_clock_mhz": None}


def test_what_a_card_does_not_tell_is_null():
    import pynvml

    def answer(handle, error=None):
        if error:
            raise error()
        return {"card": 700_000}[handle]

    ask = functools.partial(environment_module._ask, pynvml, answer)
    assert ask("card") == 700_000
    assert ask("card", pynvml.NVMLError_NotSupported) is None
    assert ask("card", pynvml.NVMLError_Unknown) is None
    # An instance of a card has no handle.
    assert ask(None) is None
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        ask("card", pynvml.NVMLError_GpuIsLost)


@pytest.mark.parametrize("error", ["NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded", "ImportError"])
def test_an_nvml_that_does_not_open_leaves_the_rest(monkeypatch, tmp_path, error):
    """Containers have CUDA and no libnvidia-ml: a result line is written, and says nothing of what NVML would know."""
    import pynvml

    def refuse():
        raise getattr(pynvml, error)()

    if error == "ImportError":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    environment_module._nvml.cache_clear()
    try:
        line = Results(tmp_path, torch.device("cuda")).add("loss", "eager", {}, Samples((1.0,)))["environment"]
    finally:
        environment_module._nvml.cache_clear()
    told = ("gpu", "driver", "power_limit_watts", "sm_clock_mhz", "memory_clock_mhz")
    assert [line[key] for key in told] == ["a card", None, None, None, None]


def test_cache_size_is_the_largest_level(tmp_path, monkeypatch):
    for number, size in enumerate(("32K", "1024K", "33M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(environment_module, "_CACHES", tmp_path)
    assert environment_module.last_level_cache_bytes.__wrapped__(CPU) == 33 * 1024 * 1024


@pytest.mark.gpu
def test_counts_on_a_gpu():
    device = torch.device("cuda", 0)
    x, y = torch.ones(1 << 20, device=device), torch.empty(1 << 20, device=device)
    # A copy between tensors of one dtype and layout is no kernel; filling with zeros is one in torch 2.11.
    assert timing.count_launches(lambda: y.copy_(x.add_(1).mul_(2)), device) == 2
    x.zero_()
    assert timing.peak_memory(lambda: torch.empty(3 << 20, dtype=torch.uint8, device=device), device) == 3 << 20
    found = {**environment(device), **environment_module.clocks(device)}
    assert found["gpu"] == torch.cuda.get_device_name(device)
    if environment_module._nvml(device)[1] is not None:
        assert all(found[key] for key in ("driver", "power_limit_watts", "sm_clock_mhz", "memory_clock_mhz"))
    taken = interleave({"add": lambda i: x.add_(1)}, device=device, repeats=5, calls=3)
    assert x[0].item() == 3 + 5 * 3
    assert min(taken["add"].seconds) > 0
