"""Runs of encoders that draw random numbers in training: stochastic depth and dropout."""

import torch

from fastsiam.runtime.seeding import seed_step
from tests.support.runs import DRAWS, assert_kills_change_nothing


def test_killed_twice_it_ends_as_an_undisturbed_run(tiny, tmp_path):
    assert_kills_change_nothing(tiny(*DRAWS, "train.epochs=1", "data.val=null"), tmp_path / "runs", (3, 7))


def test_steps_ranks_and_seeds_draw_apart_and_a_step_made_again_draws_the_same():
    def drawn(*place):
        seed_step(*place, torch.device("cpu"))
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, rank) for seed in (0, 1, 2**63 - 1) for step in (1, 2, 2**32 - 1) for rank in (0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]
