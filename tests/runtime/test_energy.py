"""Joules against cards whose power is a known function of time, by a pynvml that stands in for the real one."""

import itertools
import math
import sys
import threading
import types

import pytest
import torch

from fastsiam.runtime import energy
from fastsiam.runtime.energy import EnergyMeter
from tests.support.processes import run_python

CUDA = torch.device("cuda", 1)
UUID = "4fa2b5c6-0000-1111-2222-333344445555"


class Card:
    """A pynvml that knows one GPU; `now` is its time in seconds, `watts` its power, `joules` the integral of that."""

    def __init__(self, watts, joules=None):
        self.watts, self.total, self.now, self.opened, self.sampled = watts, joules, 0.0, 0, 0
        self.fails: dict[str, str] = {}
        self.prefix, self.mig_mode = "GPU", None
        self.module = types.ModuleType("pynvml")
        self.module.NVML_DEVICE_MIG_ENABLE = 1
        self.module.NVMLError = type("NVMLError", (Exception,), {})
        for function in (
            self.nvmlInit, self.nvmlShutdown, self.nvmlDeviceGetHandleByUUID, self.nvmlDeviceGetMigMode,
            self.nvmlDeviceGetTotalEnergyConsumption, self.nvmlDeviceGetPowerUsage,
        ):  # fmt: skip
            setattr(self.module, function.__name__, self.may_fail(function))

    def may_fail(self, function):
        def call(*arguments):
            if (text := self.fails.get(function.__name__)) is not None:
                raise self.module.NVMLError(text)
            return function(*arguments)

        return call

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != f"{self.prefix}-{UUID}":
            raise self.module.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig_mode is None:
            raise self.module.NVMLError("Not Supported")
        return [self.mig_mode, self.mig_mode]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        return round(1000 * self.total(self.now))

    def nvmlDeviceGetPowerUsage(self, handle):
        assert handle == "handle"
        self.sampled += 1
        return round(1000 * self.watts(self.now))


# A wave of 120 s about 400 W; since the driver was loaded the card has used 5 MJ.
def watts(t):
    return 400 + 250 * math.sin(2 * math.pi * t / 120)


def total(t):
    return 5e6 + 400 * t + 250 * 120 / (2 * math.pi) * (1 - math.cos(2 * math.pi * t / 120))


@pytest.fixture
def card(monkeypatch):
    card = Card(watts, total)
    monkeypatch.setitem(sys.modules, "pynvml", card.module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {CUDA: types.SimpleNamespace(uuid=UUID)}.__getitem__)
    return card


@pytest.fixture
def sampled(card, monkeypatch):
    """A card without the counter, whose own clock is time's; its thread sleeps for longer than a test takes."""
    card.fails["nvmlDeviceGetTotalEnergyConsumption"] = "Not Supported"
    monkeypatch.setattr(energy, "time", types.SimpleNamespace(monotonic=lambda: card.now))
    monkeypatch.setattr(energy._Samples, "_run", lambda samples: samples._closed.wait(60))
    return card


def test_the_counter_is_read_from_when_the_meter_was_opened(card):
    card.now = 7.0
    with EnergyMeter.of(CUDA) as meter:
        assert meter.description == "NVML total energy"
        assert meter.joules() == 0.0
        for now in (7.5, 40.0, 3607.0):
            card.now = now
            assert meter.joules() == pytest.approx(total(now) - total(7.0), abs=2e-3)
    assert card.sampled == 0


def test_power_is_integrated_by_the_trapezoidal_rule(sampled):
    """Its error is at most h^2 / 12 times the length times the largest second derivative; NVML rounds to 1 mW."""
    curvature = 250 * (2 * math.pi / 120) ** 2
    with EnergyMeter.of(CUDA) as meter:
        assert meter.description == "NVML power, sampled every 0.1 s"
        for step in (0.1, 10.0):
            before, began = meter.joules(), sampled.now
            for number in range(1, round(30 / step) + 1):
                sampled.now = began + number * step
                used = meter.joules() - before
            bound = step**2 / 12 * 30 * curvature + 30 * 0.5e-3
            assert used == pytest.approx(total(began + 30) - total(began), abs=bound)
    # With ten seconds between samples the rule's own error shows.
    assert used < total(began + 30) - total(began) - bound / 2


def test_the_thread_samples_between_questions_and_ends_with_the_meter(card, monkeypatch):
    """Power that is there between two questions only: at both ends it is nought."""
    card.fails["nvmlDeviceGetTotalEnergyConsumption"] = "Not Supported"
    enough, numbers = threading.Event(), itertools.count()
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(energy, "time", types.SimpleNamespace(monotonic=lambda: float(next(numbers))))

    def bursts(_):
        if threading.current_thread() is threading.main_thread():
            return 0.0
        if card.sampled > 20:
            enough.set()
        return 100.0

    card.watts = bursts
    meter = EnergyMeter.of(CUDA)
    assert enough.wait(60)
    meter.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "fastsiam energy" not in names
    # The clock moves a second a sample: every sample of the thread counts 100 J.
    assert meter.joules() == 100.0 * (card.sampled - 2)


def test_what_was_measured_stays_after_closing(card):
    meter = EnergyMeter.of(CUDA)
    card.now = 10.0
    meter.close()
    card.now = 20.0
    meter.close()
    assert meter.joules() == pytest.approx(total(10.0) - total(0.0), abs=2e-3)
    assert card.opened == 0


@pytest.mark.parametrize("function", ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"])
def test_a_lost_gpu_is_told_once_and_raises_nothing(sampled, function):
    if function == "nvmlDeviceGetTotalEnergyConsumption":
        sampled.fails.clear()
    told = []
    meter = EnergyMeter.of(CUDA, told.append)
    sampled.now = 1.0
    assert meter.joules() > 0
    sampled.fails |= {function: "GPU is lost", "nvmlShutdown": "GPU is lost"}
    assert [meter.joules(), meter.joules()] == [None, None]
    assert [notice.code for notice in told] == ["energy-lost"]
    # It may come back; the number would lack what was used meanwhile.
    sampled.fails.clear()
    assert meter.joules() is None
    meter.close()
    assert len(told) == 1


def test_a_gpu_lost_when_the_meter_is_closed_is_told(card):
    """By a warning of Python where there is no callback."""
    meter = EnergyMeter.of(CUDA)
    card.fails["nvmlDeviceGetTotalEnergyConsumption"] = "Unknown Error"
    with pytest.warns(UserWarning, match="Unknown Error"):
        meter.close()
    assert meter.joules() is None


def test_a_driver_loaded_again_counts_from_nought(card):
    """Though the counter is still above where the meter was opened."""
    card.total = lambda t: 100.0 * t
    told = []
    with EnergyMeter.of(CUDA, told.append) as meter:
        card.now = 50.0
        assert meter.joules() == 5000.0
        card.now = 20.0
        assert meter.joules() is None
    assert [notice.code for notice in told] == ["energy-lost"]


@pytest.mark.parametrize(
    ("attributes", "fails", "reason"),
    [
        ({}, {"nvmlDeviceGetTotalEnergyConsumption": "Not Supported", "nvmlDeviceGetPowerUsage": "Refused"}, "Refused"),
        ({"prefix": "MIG"}, {}, "a MIG instance has no energy of its own"),
        ({"mig_mode": 1}, {}, "a MIG instance has no energy of its own"),
        ({"prefix": "VGPU"}, {}, "Not Found"),
        ({}, {"nvmlInit": "Library Not Found"}, "Library Not Found"),
    ],
)
def test_where_energy_is_not_available_it_says_why(card, attributes, fails, reason):
    vars(card).update(attributes)
    card.fails |= fails
    with EnergyMeter.of(CUDA) as meter:
        assert meter.joules() is None
        assert card.opened == 0
    assert meter.description.startswith("not available (")
    assert reason in meter.description


def test_a_card_whose_mig_mode_is_off_has_its_energy_and_without_pynvml_there_is_none(card, monkeypatch):
    card.mig_mode = 0
    with EnergyMeter.of(CUDA) as meter:
        assert meter.description == "NVML total energy"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter.of(CUDA).description == "not available (nvidia-ml-py is not installed)"


def test_a_cpu_is_not_asked():
    """Nor is anything imported for it; torch, which stays out of this, imports pynvml itself."""
    code = (
        "import sys, types; from fastsiam.runtime.energy import EnergyMeter; "
        "meter = EnergyMeter.of(types.SimpleNamespace(type='cpu')); "
        "print(meter.joules(), meter.description, {'pynvml', 'torch'} & sys.modules.keys())"
    )
    assert run_python("-c", code).stdout == "None not available (CPU device) set()\n"
