"""Positions of steps that metrics.jsonl does not say outright."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.views import sizes_at
from fastsiam.replay.schedule import Schedule


def config(*overrides):
    return load_config("quickstart", ["views.size=16..32", "train.batch_size=4", *overrides])


def line(step, **fields):
    return {"kind": "train", "step": step, **fields}


def test_where_steps_are_counted_everything_follows_from_the_number():
    found = Schedule(config("train.epochs=5"), 10, [])
    assert [found.place(step) for step in (1, 10, 11, 50)] == [(0, 0), (0, 36), (1, 0), (4, 36)]
    assert (found.last_step, found.reached) == (50, 0)
    assert Schedule(config("train.epochs=5", "train.max_share=0.5"), 10, []).last_step == 25
    assert [found.progress_before(step) for step in (1, 26)] == [0.0, 0.5]
    stages = config().view_stages
    for epoch in range(5):
        assert found.sizes(10 * epoch + 3) == sizes_at(stages, epoch, epoch / 5)
    assert found.unknown_rates(1, 50) == 0
    images = Schedule(config("budget=100 images"), 10, [])
    assert (images.last_step, images.progress_before(6)) == (25, 0.2)


def test_a_larger_budget_counts_from_its_resumption_on():
    lines = [line(8, progress=8 / 20), {"kind": "resume", "step": 12}, line(16, progress=16 / 80)]
    found = Schedule(config("train.epochs=8"), 10, lines)
    assert [found.progress_before(step) for step in (12, 13)] == [11 / 20, 12 / 80]
    assert [found.epoch_progress(step) for step in (12, 13)] == [10 / 20, 10 / 80]
    assert found.unknown_rates(1, 80) == 0
    # Nothing tells what the first start had.
    assert Schedule(config("train.epochs=8"), 10, lines[1:]).unknown_rates(1, 80) == 12


def test_progress_by_time_is_that_of_lines_and_checkpoints_and_lies_between_them():
    lines = [
        line(4, progress=0.1, lr=0.3, spent_seconds=50.0, train_seconds=25.0),
        line(12, progress=0.5, lr=0.2, view_size=24),
    ]
    state = {"step": 14, "epoch": 1, "progress": 0.6, "epoch_progress": 0.45}
    found = Schedule(config("budget=2h"), 10, lines, [state])
    assert found.last_step is None
    assert found.reached == 14
    assert [found.progress_before(step) for step in (3, 5, 9, 13, 15)] == pytest.approx([0.075, 0.1, 0.3, 0.5, 0.6])
    assert found.epoch_progress(11) == 0.45
    assert found.unknown_rates(1, 12) == 10
    assert [found.sizes_are_known(step) for step in (3, 13, 25)] == [True, True, False]
    assert found.sizes(13) == (24,)
