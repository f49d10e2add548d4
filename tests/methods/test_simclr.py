"""SimCLR's loss over all anchors and over ranks, by the formula and by its gradient's size."""

import pytest
import torch
import torch.nn.functional as F

from fastsiam.methods.base import Layout
from fastsiam.methods.simclr import SimCLR
from tests.support.small_methods import OneConvolution, small_config, small_step, views_of


def cross_entropy_over_anchors(queries, keys, num_views, temperature):
    """Over the matrix of similarities, without each row's own key; the mean over its positives."""
    count = len(queries)
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    images = count // num_views
    return sum(F.cross_entropy(logits, torch.arange(count).roll(-images * v)) for v in range(1, num_views)) / (
        num_views - 1
    )


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("name", ["simclr", "simclr with a predictor", "simclr, keys held"])
def test_value_and_gradient_of_queries_and_keys(name, num_views):
    config = small_config(name, f"views.count={num_views}")
    method = small_step(config).method
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8 * num_views, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    p = method.predictor(z)
    held = z.detach() if config.method.stop_gradient else z
    expected = cross_entropy_over_anchors(p, held, num_views, method.temperature.item())
    loss = method.loss(p, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-9)


def test_with_a_predictor_that_changes_nothing_it_is_the_plain_loss():
    """Two ways to compute one value: the op of one matrix, and that of queries and keys."""
    plain, other = (small_config(name) for name in ("simclr with a predictor", "simclr"))
    plain = plain.with_values({"method.predictor": None})
    methods = [
        SimCLR(OneConvolution(), torch.nn.Identity(), torch.nn.Identity(), config.method, Layout((2,)))
        for config in (plain, small_config("simclr with a predictor"))
    ]
    assert other.method.predictor is None
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [method.double().loss(z, z).item() for method in methods]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_equal_and_opposite_rows_give_no_nan_at_a_small_temperature():
    config = small_config("simclr", "method.temperature=0.07", "views.count=2")
    method = small_step(config, torch.float32).method
    for z in (torch.ones(16, 8), torch.cat([torch.ones(4, 8), -torch.ones(4, 8)]).repeat(2, 1)):
        z.requires_grad_()
        loss = method.loss(z, z)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
    assert method(views_of(config, 0, torch.float32))["loss"].isfinite()
