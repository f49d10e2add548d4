"""Budgets of energy, on a clock and a counter that the tests turn."""

import json

import pytest

from fastsiam.run.run import Run
from tests.support.clocked_runs import Clock, Killed, Meter, spend, train_lines
from tests.support.refusals import refuses
from tests.support.runs import lines


def test_energy_is_spent_and_reported(budgeted, monkeypatch, tmp_path, capsys):
    """1 Wh is 36 s at 100 W; 3 s of it for a first kNN and 3 for the last."""
    clock = Clock()
    result = spend(budgeted("budget=1Wh"), clock, monkeypatch, joules=Meter(clock))
    assert (result.step, clock.now) == (30, 36)
    steps, end = train_lines(tmp_path / "runs/run"), lines(tmp_path / "runs/run")[-1]
    # A step of 8 images takes 100 J; the one after the kNN has its 300 J as well.
    assert [line["joules_per_image"] for line in steps] == pytest.approx([12.5] * 4 + [50] + [12.5] * 25)
    assert (end["kwh"], end["joules_per_image"]) == (pytest.approx(0.001), pytest.approx(3600 / 240))
    said = capsys.readouterr().out
    assert "12.5 J/image" in said
    assert "0.001 kWh (15 J/image); 100.0 % of 1Wh" in said
    assert json.loads((tmp_path / "runs/run/environment.json").read_text())["energy"] == "NVML total energy"


def test_a_counter_that_fails_ends_a_budget_of_energy_and_no_other(budgeted, monkeypatch, tmp_path, capsys):
    clock = Clock()
    with refuses("energy-lost", "budget"):
        spend(budgeted("budget=1Wh"), clock, monkeypatch, joules=Meter(clock, fails_at=9))
    clock = Clock()
    result = spend(budgeted("budget=36s", "run.name=time"), clock, monkeypatch, joules=Meter(clock, fails_at=9))
    assert result.step == 30
    assert [line["joules_per_image"] for line in train_lines(tmp_path / "runs/time")][:2] == [12.5, 12.5]
    assert "of process time, energy not known of the whole run; 100.0 % of 36s" in capsys.readouterr().out


def test_a_budget_of_energy_needs_to_know_what_was_used_before(budgeted, monkeypatch, tmp_path):
    """Else it would never end."""
    clock = Clock()
    spend(budgeted("budget=1Wh", "train.max_steps=3"), clock, monkeypatch, joules=Meter(clock))
    (tmp_path / "runs/run/spent.json").write_text('{"seconds": 50, "joules": null}')
    with refuses("energy-unknown", "budget"):
        spend(budgeted("budget=1Wh", "train.max_steps=9"), clock, monkeypatch, joules=Meter(clock))


def test_a_run_whose_counter_failed_goes_on_when_it_answers_again(budgeted, monkeypatch, tmp_path):
    """The 900 J of nine seconds are spent; what the run used after the last reading is not known."""
    clock = Clock()
    with refuses("energy-lost", "budget"):
        spend(budgeted("budget=1Wh"), clock, monkeypatch, joules=Meter(clock, fails_at=10))
    spent = json.loads((tmp_path / "runs/run/spent.json").read_text())["joules"]
    assert spent == 900
    clock = Clock()
    result = spend(budgeted("budget=1Wh"), clock, monkeypatch, joules=Meter(clock))
    assert (result.status, 100 * clock.now) == ("done", 3600 - spent)


def test_a_start_that_is_killed_at_once_leaves_what_was_spent_before(budgeted, monkeypatch, tmp_path):
    clock, file = Clock(), tmp_path / "runs/run/spent.json"
    spend(budgeted("budget=1Wh", "train.max_steps=3"), clock, monkeypatch, joules=Meter(clock))
    before = json.loads(file.read_text())["joules"]
    kept = []

    def killed(*_):
        kept.append(json.loads(file.read_text())["joules"])
        raise Killed

    monkeypatch.setattr(Run, "begin", killed)
    clock = Clock()
    with pytest.raises(Killed):
        spend(budgeted("budget=1Wh", "train.max_steps=9"), clock, monkeypatch, joules=Meter(clock))
    assert kept == [before]
    assert before > 0
