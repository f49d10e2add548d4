"""Every method is one graph that is compiled once, whatever changes from step to step, and trains as in eager mode."""

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from tests.support.compiling import replaced_backend
from tests.support.gloo_ranks import world
from tests.support.small_methods import indices_of, shard, small_config, small_step, trained, views_of

STEPS = 100
NAMES = ("alternating", "average", "byol", "simclr, keys held", "moco", "swav, two views", "swav, codes not held")


def compiled(config, steps, dtype=torch.float64, world=None):
    """Losses and state dict as of `trained`, where a second compilation is an error, and the number of graphs."""
    torch._dynamo.reset()
    step, losses = small_step(config, dtype, world, compiles=True), []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(steps):
            views, indices = views_of(config, number, dtype), indices_of(config, number)
            if world:
                views = [
                    shard(group, count, world) for group, (count, _) in zip(views, config.view_groups, strict=True)
                ]
                indices = indices.reshape(world.size, -1)[world.rank]
            losses.append(step(views, number + 1, indices, number / steps)["loss"].item())
    return losses, step.method.state_dict(), step.compiled.report()["graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_steps_are_one_graph(name, monkeypatch):
    """The momentum of targets changes, queues fill and come into use, prototypes thaw, averages move."""
    replaced_backend(monkeypatch, lookup_backend("aot_eager"))
    config = small_config(name)
    losses, state, graphs = compiled(config, STEPS)
    expected, weights = trained(config, STEPS)
    assert graphs == 1
    assert losses == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(state, weights, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.needs("g++")
@pytest.mark.parametrize("name", ["moco", "swav, two views"])
def test_inductor_trains_as_eager_mode(name):
    config = small_config(name, "optimizer.base_lr=0.3")
    losses, state, graphs = compiled(config, 6, torch.float32)
    expected, weights = trained(config, 6, torch.float32)
    assert graphs == 1
    assert losses == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(state, weights, atol=1e-3, rtol=1e-3)


def compiled_on_rank(config):
    with pytest.MonkeyPatch.context() as patch:
        replaced_backend(patch, lookup_backend("aot_eager"))
        return compiled(config, 5, world=world())


@pytest.mark.slow
def test_two_ranks_gather_inside_of_the_graph(ranks):
    """Sums of Sinkhorn-Knopp with their gradients, and those of batch norm."""
    config = small_config("swav, codes not held")
    for _, state, graphs in ranks(2, compiled_on_rank, config):
        assert graphs == 1
        torch.testing.assert_close(state, trained(config, 5)[1], atol=1e-8, rtol=1e-8)
