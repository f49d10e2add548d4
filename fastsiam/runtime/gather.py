"""Rows of all ranks, by functional collectives: ops that `torch.compile(fullgraph=True)` sees, on CPUs too."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

# torch 2.14 renamed it, and warns at eager calls of the old name.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor


def of_all_ranks(values: torch.Tensor, world_size: int) -> torch.Tensor:
    """Returns [W, K, ...] of this rank's [K, ...], in the order of ranks, over the default group; no gradient."""
    if world_size == 1:
        return values.detach().unsqueeze(0)
    # Detached: the collective passes gradients on by itself in eager mode (torch 2.14).
    return _all_gather(values.detach(), 0, dist.group.WORLD).view(world_size, *values.shape)


def gathered(values: torch.Tensor, world_size: int, rank: int) -> torch.Tensor:
    """Returns `of_all_ranks(values)` with gradients: that of the sum of all ranks' losses.

    Where DDP averages over ranks losses that are means of each rank's images, the gradient is that of the mean over all
    images, as on one rank.
    """
    return values.unsqueeze(0) if world_size == 1 else _Gathered.apply(values, world_size, rank)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, world_size, rank):
        ctx.world_size, ctx.rank = world_size, rank
        return of_all_ranks(values.contiguous(), world_size)

    @staticmethod
    def backward(ctx, grad):
        # Gathered and added: an all-reduce of a buffer that is read again races under Inductor (torch 2.14).
        return of_all_ranks(grad.contiguous(), ctx.world_size).sum(0)[ctx.rank], None, None
