"""The collapse measures in closed form, and when the guard speaks."""

import math

import pytest
import torch

from fastsiam.config import load_config
from fastsiam.evaluate.collapse import (
    CENTRED,
    IN_A_ROW,
    JUDGE_AFTER_STEPS,
    LEAST_EFFECTIVE_RANK,
    CollapseGuard,
    Measures,
    is_collapsed,
    limits_of,
    measure,
)

CONSTANT = Measures(std_ratio=0.02, effective_rank=30.0, mean_abs_cos=0.99)
HEALTHY = Measures(std_ratio=0.95, effective_rank=5.0, mean_abs_cos=0.5)


def test_a_constant_is_one_point_whatever_its_length():
    z = (
        torch.randn(64, generator=torch.Generator().manual_seed(0)).expand(100, 64)
        * torch.linspace(0.1, 9, 100)[:, None]
    )
    found = measure(z)
    assert found.std_ratio == pytest.approx(0, abs=1e-6)
    assert found.mean_abs_cos == pytest.approx(1)


def test_isotropic_noise_is_spread_out():
    z = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    found = measure(z)
    assert found.std_ratio == pytest.approx(1, abs=0.01)
    assert found.effective_rank == pytest.approx(32, rel=0.02)
    # E|cos| of two random directions in d dimensions is sqrt(2 / (pi d)) for large d.
    assert found.mean_abs_cos == pytest.approx(math.sqrt(2 / (math.pi * 32)), rel=0.03)


def test_a_line_keeps_its_spread_but_not_its_rank():
    signs = torch.tensor([1.0, -1.0]).repeat(50)
    direction = torch.full((16,), 0.25)
    found = measure(signs[:, None] * direction)
    assert found.effective_rank == pytest.approx(1)
    assert found.mean_abs_cos == pytest.approx(1)
    assert found.std_ratio == pytest.approx(math.sqrt(100 / 99))
    assert is_collapsed(found)


def test_two_equal_directions_in_closed_form():
    """Half e1, half e2: variance 1/4 in both, one eigenvalue, cosine 1 within and 0 between the halves."""
    z = torch.eye(4)[[0, 1]].repeat(10, 1)
    found = measure(z)
    assert found.effective_rank == pytest.approx(1)
    assert found.std_ratio == pytest.approx(2 * math.sqrt(0.25 * 20 / 19) * 2 / 4)
    assert found.mean_abs_cos == pytest.approx(2 * 10 * 9 / (20 * 19))


def test_two_axes_of_unequal_weight_in_closed_form():
    """Six points on one axis and two on the other, balanced about zero: eigenvalues in the ratio 3 to 1."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 3 + [[0.0, 1.0], [0.0, -1.0]])
    found = measure(z)
    assert found.effective_rank == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert found.std_ratio == pytest.approx((math.sqrt(6 / 7) + math.sqrt(2 / 7)) / 2 * math.sqrt(2))
    assert found.mean_abs_cos == pytest.approx((6 * 5 + 2 * 1) / (8 * 7))


def test_scaling_rows_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(50, 8, generator=generator)
    scaled = measure(z * torch.rand(50, 1, generator=generator).add(0.1))
    assert [*scaled.fields().values()] == pytest.approx([*measure(z).fields().values()])


def test_what_counts_as_collapsed():
    assert is_collapsed(CONSTANT)
    assert not is_collapsed(HEALTHY)
    spread = {"std_ratio": CENTRED.least_std_ratio + 0.01, "effective_rank": LEAST_EFFECTIVE_RANK + 0.1}
    assert not is_collapsed(Measures(**spread, mean_abs_cos=0.999))
    # Few directions alone are no collapse: healthy runs of the quickstart start at an effective rank of 3.
    assert not is_collapsed(Measures(std_ratio=0.97, effective_rank=1.5, mean_abs_cos=0.7))


# Of seeds of the quickstart with each method: the healthy measure nearest to the limits after 124 steps, in runs that
# ended with 50 to 91 % kNN, and those of runs without what prevents their collapse.
HEALTHY_CONES = {
    "byol": (0.142, 13.9, 0.979),
    "simclr": (0.452, 2.2, 0.744),
    "moco": (0.105, 1.99, 0.985),
    "swav": (0.179, 1.6, 0.956),
}
COLLAPSED_CONES = {"byol without predictor": (0.031, 15.9, 0.999), "swav by softmax": (0.034, 14.7, 0.999)}


def test_a_narrow_cone_of_a_projection_that_nothing_centres_is_healthy():
    limits = limits_of(load_config("quickstart", ["method.name=moco", "method.queue=1024"]))
    assert [name for name, cone in HEALTHY_CONES.items() if is_collapsed(Measures(*cone), limits)] == []
    assert [name for name, cone in COLLAPSED_CONES.items() if not is_collapsed(Measures(*cone), limits)] == []
    # SimSiam's batch norm centres z: there a cone is a collapse.
    centred = limits_of(load_config("quickstart"))
    assert is_collapsed(Measures(*HEALTHY_CONES["byol"]), centred)


def test_the_guard_waits_for_two_epochs_and_for_two_measures_in_a_row():
    guard = CollapseGuard(steps_per_epoch=200)
    assert not guard.judge(200, CONSTANT)
    assert not guard.judge(399, CONSTANT)
    assert not guard.judge(400, CONSTANT)
    assert not guard.judge(600, HEALTHY)
    assert not guard.judge(800, CONSTANT)
    assert IN_A_ROW == 2
    assert guard.judge(1000, CONSTANT)
    assert guard.first_alarm
    assert guard.judge(1200, CONSTANT)
    assert not guard.first_alarm


def test_short_epochs_are_judged_after_enough_steps_to_fill_the_running_statistics():
    guard = CollapseGuard(steps_per_epoch=3)
    for step in range(1, JUDGE_AFTER_STEPS):
        assert not guard.judge(step, CONSTANT)
    assert [step for step in range(1, 101) if guard.due(step)] == [25, 50, 75, 100]
    assert CollapseGuard(steps_per_epoch=2502).every_steps == 500
    assert CollapseGuard(steps_per_epoch=62).every_steps == 62
