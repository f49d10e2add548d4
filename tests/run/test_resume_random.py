"""Runs of encoders that draw random numbers in training: stochastic depth and dropout."""

import pytest
import torch

from fastsiam.runtime.seeding import seed_step
from tests.run.test_resume_average import die_at
from tests.support.runs import EVERY_STEP, assert_same_run, lines, train_here

# Stochastic depth in 15 of its 16 blocks. PIL's DataLoader draws from torch's generator when an iteration begins.
DRAWS = (
    "model.encoder=efficientnet_b0", "model.stem=imagenet", "model.width=null", "data.backend=pil", "data.workers=0",
)  # fmt: skip


def test_killed_twice_it_ends_as_an_undisturbed_run(tiny, tmp_path):
    runs, overrides = tmp_path / "runs", tiny(*DRAWS, "train.epochs=1", "data.val=null")
    train_here([*overrides, "run.name=whole"])
    for step in (3, 7):
        with pytest.raises(RuntimeError, match="killed"):
            train_here([*overrides, EVERY_STEP, "run.name=killed"], spoil=die_at(step))
    train_here([*overrides, "run.name=killed"])
    assert [line["step"] for line in lines(runs / "killed") if line["kind"] == "resume"] == [2, 6]
    assert_same_run(runs / "whole", runs / "killed")


def test_steps_ranks_and_seeds_draw_apart_and_a_step_made_again_draws_the_same():
    def drawn(*place):
        seed_step(*place, torch.device("cpu"))
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, rank) for seed in (0, 1, 2**63 - 1) for step in (1, 2, 2**32 - 1) for rank in (0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]
