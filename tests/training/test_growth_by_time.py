"""Views that grow when their share of a budget of time is spent, in mid-epoch too; ten steps of a second an epoch."""

import numpy as np
import pytest

from fastsiam.config import load_config
from fastsiam.data import rng
from fastsiam.replay.schedule import Schedule
from fastsiam.run.evaluation_schedule import EvaluationSchedule
from tests.support.clocked_runs import Clock, spend
from tests.support.gloo_ranks import world as gloo_world
from tests.support.runs import lines

# Of 100 s by steps of 1 s: these shares are spent after 46 and 77 steps, both in mid-epoch.
STARTS = (0.455, 0.765)
SIZES = 46 * [(16,)] + 31 * [(24,)] + 23 * [(32,)]


def recorded(patch):
    """(indices, sizes of the groups' views) of each batch that is trained on."""
    seen = []
    patch.setattr(
        EvaluationSchedule,
        "remember",
        lambda self, views, indices: seen.append((indices.tolist(), tuple(group.shape[-1] for group in views))),
    )
    return seen


@pytest.fixture
def batches(monkeypatch):
    return recorded(monkeypatch)


@pytest.fixture
def growing(tiny):
    def overrides(*more):
        budget = ("train.epochs=null", "budget=100s", "data.val=null", "evaluate.knn_every_epochs=null")
        return tiny("views.size=16..32", f"train.views_grow_at={list(STARTS)}", *budget, *more)

    return overrides


@pytest.mark.parametrize("backend", ["dali", "resident", "pil"])
def test_a_size_begins_with_its_share_and_no_image_is_lost(growing, batches, monkeypatch, backend):
    overrides = growing(f"data.backend={backend}")
    assert spend(overrides, Clock(evaluation=0.0), monkeypatch).status == "done"
    assert [size for _, size in batches] == SIZES
    seed = load_config("quickstart", overrides).train.seed
    # The batches that were under way when a size ended are trained on at the next one.
    for epoch in range(10):
        trained = np.concatenate([indices for indices, _ in batches[10 * epoch : 10 * epoch + 10]])
        np.testing.assert_array_equal(trained, rng.epoch_order(seed, epoch, 80))


def test_the_log_tells_each_step_its_size(growing, batches, monkeypatch, tmp_path):
    """With a line every eight steps, so that none of them is at a change."""
    overrides = growing("train.log_every_steps=8")
    spend(overrides, Clock(evaluation=0.0), monkeypatch)
    found = lines(tmp_path / "runs/run")
    begun = [(line["step"], line["sizes"]) for line in found if line["kind"] == "views"]
    assert begun == [(0, [16]), (46, [24]), (77, [32])]
    schedule = Schedule(load_config("quickstart", overrides), 10, found)
    assert [schedule.sizes(step) for step in range(1, 101)] == [size for _, size in batches]
    assert all(schedule.sizes_are_known(step) for step in range(1, 101))


def test_a_run_that_is_stopped_in_mid_epoch_goes_on_at_its_size(growing, batches, monkeypatch, tmp_path):
    clock = Clock(evaluation=0.0)
    for stop, steps in (("train.max_steps=53", 53), ("train.max_steps=null", 100)):
        assert spend(growing(stop), clock, monkeypatch).step == steps
    assert [size for _, size in batches] == SIZES
    begun = [(line["step"], line["sizes"]) for line in lines(tmp_path / "runs/run") if line["kind"] == "views"]
    assert begun == [(0, [16]), (46, [24]), (53, [24]), (77, [32])]


def grow_here(overrides):
    """On each rank, with clocks that run apart."""
    world = gloo_world()
    with pytest.MonkeyPatch.context() as patch:
        batches = recorded(patch)
        spend(overrides, Clock(step=1.0 + 0.5 * world.rank, evaluation=0.0), patch, world)
    return batches


def test_all_ranks_grow_at_the_same_step_by_the_clock_of_the_first(ranks, growing):
    of_ranks = ranks(2, grow_here, growing())
    for batches in of_ranks:
        assert [size for _, size in batches] == SIZES
    trained = [np.concatenate([batch[0] for batch in pair]) for pair in zip(*of_ranks, strict=True)]
    np.testing.assert_array_equal(np.concatenate(trained[40:50]), rng.epoch_order(0, 4, 80))


def test_all_groups_take_their_sizes_together(growing, batches, monkeypatch):
    group = "{{recipe: demo, color: matrix, size: {}}}".format
    spend(growing(f"views=[{group('16..32')}, {group('8..16')}]"), Clock(evaluation=0.0), monkeypatch)
    assert [size for _, size in batches] == 46 * [(16, 8)] + 31 * [(24, 8)] + 23 * [(32, 16)]


def test_epochs_and_images_count_steps_and_grow_between_epochs(growing):
    def in_mid_epoch(*budget):
        return load_config("quickstart", growing(*budget)).grows_in_mid_epoch

    assert in_mid_epoch()
    assert in_mid_epoch("budget=1kWh")
    assert not in_mid_epoch("budget=8000 images")
    assert not in_mid_epoch("budget=null", "train.epochs=10")
    assert not in_mid_epoch("views.size=32")
