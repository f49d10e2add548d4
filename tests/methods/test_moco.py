"""MoCo's queue, a ring of the keys of earlier steps, and the network that makes them."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.papers import TOLERANCE, trained_beside
from tests.support.small_methods import METHODS, call_view_by_view, indices_of, small_config, small_step, views_of

NAMES = [name for name in METHODS if name.startswith("moco")]


@pytest.mark.parametrize("name", NAMES)
def test_the_queue_is_a_ring_and_the_keys_network_follows(name):
    """Five steps fill it and go on from its beginning."""
    config = small_config(name)
    method, paper = trained_beside(config)
    keys = 8 * (2 if config.method.symmetric else 1)
    assert (len(method.queue), method.pointer.item()) == (3 * keys, 2 * keys)
    torch.testing.assert_close(method.queue, torch.stack(paper.queue), atol=TOLERANCE, rtol=0)
    for ours, theirs in zip((method.key.encoder, method.key.projector), paper.follower, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_keys_of_a_step_are_in_the_queue_after_it_in_the_order_of_the_batch(name):
    config = small_config(name)
    step = small_step(config)
    first = step.method.queue.clone()
    out = step(views_of(config, 0), 1, indices_of(config, 0), 0.0)
    new = F.normalize(out["keys"], dim=1)
    torch.testing.assert_close(step.method.queue[: len(new)], new, atol=1e-12, rtol=0)
    assert torch.equal(step.method.queue[len(new) :], first[len(new) :])
    assert not out["keys"].requires_grad


def test_the_first_queue_is_of_random_unit_rows_that_the_seed_gives():
    queues = [small_step(small_config("moco"), torch.float32).method.queue for _ in range(2)]
    assert torch.equal(*queues)
    torch.testing.assert_close(queues[0].norm(dim=1), torch.ones(24))
    assert (queues[0] @ queues[0].T).fill_diagonal_(0).abs().max() < 0.999


def test_two_groups_of_one_view_are_one_group_of_two():
    """Recipes of their own for query and key, in views of one size or of two."""
    config = small_config("moco")
    for side in (8, 4):
        groups = ", ".join(f"{{recipe: demo, size: {size}, color: matrix, count: 1}}" for size in (8, side))
        method = small_step(small_config("moco", f"views=[{groups}]")).method
        query, key = views_of(config, 0)[0].chunk(2)
        key = key[..., :side, :side]
        loss = method([query, key])["loss"]
        call_view_by_view(method)
        pairs = (method, query), (method.key, key)
        q, k = (F.normalize(network.projector(network.encoder(view)), dim=1) for network, view in pairs)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.T], 1) / method.temperature
        expected = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
