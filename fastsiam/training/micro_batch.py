"""A batch cut into micro batches, and what a method has returned for them put together again."""

import torch


def micro_batch_of(views: list[torch.Tensor], number: int, count: int) -> list[torch.Tensor]:
    """Returns micro batch `number` of `count`: the images number, number + count, ... of every view.

    `views`: [V_g*N, 3, S_g, S_g] a group, view by view, N a multiple of `count`. Returns [V_g*N/count, 3, S_g, S_g]
    a group, view by view, copied into the memory format of `views`: every micro batch has the shape and the strides of
    the others. Taken so rather than in blocks, the images are the same on any number of ranks.
    """
    if count == 1:
        return views
    return [group[number::count].contiguous(memory_format=_memory_format(group)) for group in views]


def together(outs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns what the whole batch gives, of what its micro batches gave, detached.

    Scalars are averaged; rows, one for each view of each image, stand in the order of the whole batch.
    """
    return {name: _joined([out[name].detach() for out in outs]) for name in outs[0]}


def _joined(values):
    stacked = torch.stack(values, dim=min(values[0].dim(), 1))
    return stacked.flatten(0, 1) if values[0].dim() else stacked.mean()


def _memory_format(group):
    is_last = group.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format
