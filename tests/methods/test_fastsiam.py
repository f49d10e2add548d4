"""SimSiam's variants by formula: FastSiam's mean target, one direction, cross-entropy."""

import pytest
import torch

from tests.support.numerics import algorithm_1
from tests.support.papers import trained_beside
from tests.support.small_methods import indices_of, small_config, small_step, views_of


def steps_of(config, count=4):
    """Losses and weights, in fp32."""
    step, losses = small_step(config, torch.float32), []
    for number in range(count):
        out = step(views_of(config, number, torch.float32), number + 1, indices_of(config, number), number / count)
        losses.append(out["loss"].item())
    return losses, step.method.state_dict()


def test_one_target_of_two_views_is_simsiam_to_the_rounding():
    """In fp32: the mean of one target is the target."""
    (losses, weights), (expected, others) = (
        steps_of(small_config("simsiam", *more)) for more in (("method.target_views=1",), ())
    )
    assert losses == expected
    torch.testing.assert_close(weights, others, atol=0, rtol=0)


@pytest.mark.parametrize("targets", [1, 3])
def test_as_many_targets_as_there_are_other_views_or_fewer_in_a_circle(targets):
    trained_beside(small_config("fastsiam", f"method.target_views={targets}"))


def test_the_mean_of_targets_is_not_the_mean_over_pairs():
    config = small_config("fastsiam", "method.target_views=3")
    mean, pairs = (small_step(c).method for c in (config, config.with_values({"method.target_views": None})))
    views = views_of(config, 0)
    assert abs(mean(views)["loss"].item() - pairs(views)["loss"].item()) > 1e-3


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.stop_gradient=false",),
        ("method.predictor=null",),
        ("method.similarity=cross_entropy", "views.count=3"),
        ("method.symmetric=false",),
        ("method.symmetric=false", "method.similarity=cross_entropy", "views.count=4"),
    ],
    ids=", ".join,
)
def test_other_variants(overrides):
    config = small_config("simsiam", *overrides)
    if config.method.stop_gradient:
        trained_beside(config)
        return
    method = small_step(config).method
    z = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    p = method.predictor(z)
    loss = method.loss(p, method.targets(None, z))
    expected = algorithm_1(*p.chunk(2), *z.chunk(2), stop_gradient=False)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    ours, theirs = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
