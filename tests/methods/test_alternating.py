"""SimSiam as alternating optimisation, and with an average over augmentations in place of the predictor."""

import copy

import numpy as np
import pytest
import torch

from tests.methods.test_fastsiam import steps_of
from tests.support.papers import TOLERANCE, trained_beside
from tests.support.small_methods import IMAGES, indices_of, small_config, small_step, views_of


def test_one_step_is_simsiam_to_the_rounding():
    losses, weights = steps_of(small_config("alternating", "method.steps=1"))
    expected, others = steps_of(small_config("simsiam"))
    assert losses == expected
    torch.testing.assert_close({name: weights[name] for name in others}, others, atol=0, rtol=0)
    assert steps_of(small_config("alternating", "method.steps=2"))[0] != expected


def test_a_run_goes_on_in_the_middle_of_a_cycle():
    """Of three steps: saved after four, and loaded into a method that has counted other steps."""
    config = small_config("alternating")
    step, other = (small_step(config) for _ in range(2))

    def take(of, numbers):
        return [of(views_of(config, n), n + 1, indices_of(config, n), 0.0)["loss"].item() for n in numbers]

    take(step, range(4))
    take(other, range(2))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert take(other, range(4, 8)) == take(step, range(4, 8))
    assert other.method.step == 8


def test_the_average_of_each_image_is_that_of_a_dictionary():
    method, paper = trained_beside(small_config("average"), steps=7)
    expected = torch.stack([paper.eta[image] for image in range(IMAGES)])
    torch.testing.assert_close(method.eta, expected, atol=TOLERANCE, rtol=0)
    assert (expected.norm(dim=1) > 0).sum() > 16


TWO_GROUPS = f"views=[{', '.join(['{recipe: demo, size: 8, color: matrix, count: 1}'] * 2)}]"


@pytest.mark.parametrize("views", ["views.count=2", TWO_GROUPS])
def test_the_average_stays_where_no_image_of_the_step_is(views):
    config = small_config("average", views)
    step = small_step(config)
    indices = np.array([3, 1, 4, 15, 9, 2, 6, 5])
    out = step(views_of(config, 0), 1, indices, 0.0)
    z1, z2 = out["z"].chunk(2)
    torch.testing.assert_close(step.method.eta[indices], 0.2 * (z1 + z2) / 2, atol=1e-14, rtol=0)
    rest = np.setdiff1d(np.arange(IMAGES), indices)
    assert (step.method.eta[rest] == 0).all()


def test_an_average_is_rehearsed_without_a_trace():
    """As before training on a GPU whose views grow."""
    step = small_step(small_config("average"), torch.float32)
    before = {name: value.clone() for name, value in step.method.state_dict().items()}
    step.rehearse()
    torch.testing.assert_close(step.method.state_dict(), before, atol=0, rtol=0)
