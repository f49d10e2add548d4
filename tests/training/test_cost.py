"""What a run has cost, counted over kills and damaged files."""

import json
import os
import subprocess
import sys
import time

import pytest

from fastsiam.config.budget import parse_budget
from fastsiam.training.cost import CostMeter, heartbeat_seconds
from fastsiam.training.state import State
from fastsiam.training.timing import Laps, Stopwatch
from tests.support.files import largest_file


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Meter:
    """Reads the joules that a test sets."""

    joules_now: float | None = 0.0

    def joules(self):
        return self.joules_now


def cost_of(folder=None, joules=None, **more):
    """A meter whose energy has been read."""
    cost = CostMeter(folder, Meter(), **more)
    read(cost, joules)
    return cost


def read(cost, joules):
    cost.energy.joules_now = joules
    cost.read_energy()


def test_earlier_starts_count_and_the_time_between_them_does_not(tmp_path):
    clock = Clock()
    first = cost_of(tmp_path, 50.0, began=clock.now - 3, clock=clock)
    clock.now += 10
    first.write()
    # Killed 2 s after its last heartbeat, and started again half an hour later.
    clock.now += 2 + 1800
    second = cost_of(tmp_path, began=clock.now - 4, clock=clock)
    assert second.seconds == pytest.approx(13 + 4)
    assert second.joules is None
    clock.now += 6
    read(second, 7.0)
    assert (second.seconds, second.joules) == (pytest.approx(23), 57.0)
    second.write()
    assert json.loads((tmp_path / "spent.json").read_text()) == {"seconds": pytest.approx(23), "joules": 57.0}


def test_energy_that_was_not_measured_for_a_while_is_not_known(tmp_path):
    (tmp_path / "spent.json").write_text('{"seconds": 5, "joules": 40}')
    spent = cost_of(tmp_path, 3.0)
    assert spent.joules == 43
    read(spent, None)
    assert (spent.joules, spent.joules_per_image(8), spent.fields(None)["kwh"]) == (None,) * 3
    spent.write()
    again = cost_of(tmp_path, 3.0)
    assert again.joules is None


@pytest.mark.parametrize("text", ["", "{", '{"seconds": "many", "joules": 0}', '{"joules": 3}', "[1, 2]"])
def test_of_a_damaged_file_the_last_line_that_was_logged_counts(tmp_path, text):
    """Otherwise a power cut would give a run its whole budget again."""
    (tmp_path / "spent.json").write_text(text)
    clock, told = Clock(), []
    spent = cost_of(tmp_path, 1.0, warn=told.append, clock=clock)
    assert (spent.seconds, spent.joules) == (0, None)
    logged = {"kind": "train", "step": 5, "spent_seconds": 120.0, "kwh": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(logged) + '\n{"kind": "knn", "step": 5}\n{"kind": "tr')
    spent = cost_of(tmp_path, 1.0, warn=told.append, clock=clock)
    assert (spent.seconds, spent.joules) == (120, 1.8e6 + 1)
    assert [notice.code for notice in told] == ["damaged-cost"] * 2


def test_energy_an_image_between_laps_and_of_the_whole():
    spent, state = cost_of(), State()
    laps = Laps(state, Stopwatch(state), spent)
    assert (laps.next().joules_per_image, spent.joules_per_image(64), spent.fields(None)["kwh"]) == (None, None, None)
    read(spent, 100.0)
    state.advance(10)
    assert laps.next().joules_per_image is None
    read(spent, 160.0)
    state.advance(20)
    assert laps.next().joules_per_image == pytest.approx(3)
    other = Laps(state, Stopwatch(state), spent)
    state.advance(1)
    assert (other.next().images, laps.next().images, laps.next().images) == (1, 1, 0)
    assert spent.joules_per_image(64) == pytest.approx(2.5)
    read(spent, 3.6e6)
    expected = {"spent_seconds": pytest.approx(spent.seconds, abs=1), "joules_per_image": 1.5, "kwh": 1.0}
    assert spent.fields(1.5) == expected


def test_the_file_is_kept_up_to_date_and_a_full_disk_is_told(tmp_path):
    spent = CostMeter(tmp_path, every=0.01)
    spent.__enter__()
    deadline, seen = time.monotonic() + 30, set()
    while len(seen) < 3 and time.monotonic() < deadline:
        if (tmp_path / "spent.json").exists():
            seen.add(json.loads((tmp_path / "spent.json").read_text())["seconds"])
    assert len(seen) == 3
    spent.__exit__()
    last = json.loads((tmp_path / "spent.json").read_text())["seconds"]
    assert last >= max(seen)
    with largest_file(4):
        spent.write()
    assert spent.error is not None
    assert json.loads((tmp_path / "spent.json").read_text())["seconds"] == last
    assert [path.name for path in tmp_path.iterdir()] == ["spent.json"]
    spent.write()
    assert spent.error is None


def test_a_rank_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CostMeter():
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_shell_did_before_it_became_this_process_does_not_count():
    """exec keeps the starttime of /proc/self/stat."""
    command = (
        "import time; began = time.monotonic(); "
        "from fastsiam.training.cost import process_began; print(began, process_began())"
    )
    script = f"sleep 1; exec '{sys.executable}' -c '{command}'"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    python_began, process = map(float, run.stdout.split())
    assert python_began <= process <= time.monotonic()


def test_heartbeats_of_short_budgets_are_closer():
    every = {text: heartbeat_seconds(parse_budget(text)) for text in ("8h", "20min", "200s", "10M images", "1kWh")}
    assert every == {"8h": 5, "20min": 5, "200s": 1, "10M images": None, "1kWh": 5}
