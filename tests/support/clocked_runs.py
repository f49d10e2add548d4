"""Runs whose seconds pass by a clock that a test turns."""

import functools

import pytest

from fastsiam.config import load_config
from fastsiam.run import start as start_module
from fastsiam.run.finish import finish
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.train import opened, train
from fastsiam.training.cost import CostMeter
from tests.support.runs import lines


class Clock:
    """Seconds that pass only where a test says so; every step, evaluation and save has its price."""

    def __init__(self, step=1.0, evaluation=3.0):
        self.now, self.step, self.evaluation = 0.0, step, evaluation

    def __call__(self):
        return self.now


class Meter(EnergyMeter):
    """100 J for each step of the clock, until it fails."""

    def __init__(self, clock, watts=100.0, fails_at=None):
        super().__init__(None, "NVML total energy", pytest.fail)
        self.clock, self.watts, self.fails_at = clock, watts, fails_at

    def joules(self):
        return None if self.fails_at is not None and self.clock.now >= self.fails_at else self.watts * self.clock.now


class Killed(Exception):
    """Ends a run as SIGKILL would."""


def taking(clock, seconds, call):
    """Returns `call`, which takes so many seconds of the clock."""

    def taken(*arguments):
        clock.now += seconds
        return call(*arguments)

    return taken


def spend(overrides, clock, monkeypatch, world=None, joules=None):
    """A whole run on the clock; returns its result and the clock's time after the last evaluation."""
    timed = functools.partial(CostMeter, clock=clock)
    monkeypatch.setattr(start_module, "CostMeter", timed)
    if joules is not None:
        monkeypatch.setattr(start_module.EnergyMeter, "of", lambda *_: joules)
    config = load_config("quickstart", overrides)
    with opened(config, world, began=clock.now) as (parts, earlier):
        if earlier is not None:
            return earlier
        data, step, progress, evaluation, run = parts
        stepped = taking(clock, clock.step, step)
        # A step as `train` sees it.
        for name in ("optimizer", "method", "read", "compiled", "state_dict"):
            setattr(stepped, name, getattr(step, name))
        online = evaluation._online
        online.knn, online.spectrum = (taking(clock, clock.evaluation, way) for way in (online.knn, online.spectrum))
        status = train(config, data, stepped, progress, evaluation, run)
        return finish(run, status, step, evaluation)


def train_lines(folder):
    return [line for line in lines(folder) if line["kind"] == "train"]
