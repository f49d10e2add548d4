"""BYOL's loss convention and its target, which follows along a cosine of progress."""

import math

import pytest
import torch

from fastsiam.methods.byol import momentum_at
from tests.support.numerics import algorithm_1
from tests.support.papers import TOLERANCE, trained_beside
from tests.support.small_methods import call_view_by_view, small_config, small_step, views_of


def test_the_share_that_the_target_keeps_rises_to_one_after_the_last_step():
    steps = 50
    shares = [momentum_at(step / steps, 0.97) for step in range(steps)]
    assert shares[0] == pytest.approx(0.97, abs=1e-15)
    assert shares == sorted(shares)
    assert shares[steps // 2] == pytest.approx(0.985, abs=1e-12)
    assert shares[-1] < 1
    assert shares[-1] == pytest.approx(1 - 0.03 * (math.cos(math.pi * 49 / 50) + 1) / 2, abs=1e-15)
    assert momentum_at(1.0, 0.97) == 1


def test_the_target_follows_the_weights_after_each_step():
    """Its running statistics are those of its own outputs."""
    method, paper = trained_beside(small_config("byol"))
    for ours, theirs in zip((method.target.encoder, method.target.projector), paper.follower, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=TOLERANCE, rtol=TOLERANCE)
    apart = (method.target.encoder[0].weight - method.encoder[0].weight).abs().max()
    assert apart > 1e-3


def test_the_gradient_is_four_times_that_of_simsiams_convention():
    """Of a target with the weights of the online network, whose predictions and targets are SimSiam's."""
    method = small_step(small_config("byol")).method
    views = views_of(small_config("byol"), 0)
    loss = method(views)["loss"]
    gradient = torch.autograd.grad(loss, method.predictor[-1].weight)[0]
    assert 0 <= loss.item() <= 8
    call_view_by_view(method)
    z1, z2 = (method.projector(method.encoder(view)) for view in views[0].chunk(2))
    plain = algorithm_1(method.predictor(z1), method.predictor(z2), z1, z2)
    assert loss.item() == pytest.approx(4 + 4 * plain.item(), abs=1e-12)
    theirs = torch.autograd.grad(plain, method.predictor[-1].weight)[0]
    torch.testing.assert_close(gradient, 4 * theirs, atol=1e-12, rtol=1e-10)


def test_in_bf16_the_target_moves_in_fp32():
    """In bf16 most of these moves would be below its last bit."""
    config = small_config("byol", "method.momentum=0.996")
    step = small_step(config, torch.bfloat16)
    target, online = step.method.target.encoder[0].weight, step.method.encoder[0].weight
    expected, first = target.double(), target.clone()
    for number in range(5):
        step(views_of(config, number, torch.bfloat16), number + 1, None, 0.0)
        expected = 0.996 * expected + 0.004 * online.detach().double()
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.double(), expected, atol=1e-6, rtol=0)
    assert (target - first).abs().max() > 1e-5


def test_three_views_are_compared_in_all_ordered_pairs():
    config = small_config("byol", "views.count=3")
    method = small_step(config).method
    out = method(views_of(config, 0))
    call_view_by_view(method)
    views = views_of(config, 0)[0].chunk(3)
    p = [method.predictor(method.projector(method.encoder(view))) for view in views]
    z = [method.target.projector(method.target.encoder(view)) for view in views]
    terms = [2 - 2 * torch.cosine_similarity(p[i], z[j], dim=1).mean() for i in range(3) for j in range(3) if i != j]
    assert out["loss"].item() == pytest.approx(2 * sum(terms).item() / 6, abs=1e-12)
