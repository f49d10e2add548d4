"""Rows of all ranks in order, with the gradient of the sum of all ranks' losses or with none."""

import torch
import torch.distributed as dist

from fastsiam.runtime.gather import gathered, of_all_ranks


def gathered_on_a_rank():
    """Each rank's loss weighs what every rank has given by rank + 1."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    values = own * (rank + 1)
    everyone = gathered(values, size, rank)
    weights = torch.arange(1.0, 9.0).view(2, 2, 2) * (rank + 1)
    (everyone * weights).sum().backward()
    plain = of_all_ranks(values, size)
    return everyone.detach(), own.grad, plain.requires_grad, torch.equal(plain, everyone.detach())


def test_rows_come_in_the_order_of_ranks_with_the_gradient_of_all_losses(ranks):
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for rank, (everyone, grad, plain_has_gradient, is_same) in enumerate(ranks(2, gathered_on_a_rank)):
        assert torch.equal(everyone, torch.stack([rows, 2 * rows]))
        # Both ranks' weights, 1 and 2 times, of this rank's part; its rows are rank + 1 times its own.
        assert torch.equal(grad, (1 + 2) * torch.arange(1.0, 9.0).view(2, 2, 2)[rank] * (rank + 1))
        assert not plain_has_gradient
        assert is_same


def test_one_rank_has_its_own_rows():
    own = torch.ones(3, 2, requires_grad=True)
    assert gathered(own, 1, 0).requires_grad
    assert not of_all_ranks(own, 1).requires_grad
    assert of_all_ranks(own, 1).shape == (1, 3, 2)
