"""Launches of an optimizer's step, from the operators that it calls."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.traffic.count import Launch

# ATen/native/cuda/MultiTensorApply.cuh (torch 2.14): how many tensors, by the number of lists, and how many chunks of
# 65,536 elements one launch takes; since CUDA 13 its arguments may be eight times as large.
_CHUNK = 65_536
_TENSORS = {True: (770, 448, 336, 252, 210), False: (110, 64, 48, 36, 30)}
_BLOCKS = {True: 2240, False: 320}


def launches_of_optimizer(optimizer: torch.optim.Optimizer) -> list[Launch]:
    """Launches of one step on CUDA, after the first; takes two steps on the CPU with gradients of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    # The first one makes the state.
    optimizer.step()
    with _Recorder() as recorder:
        optimizer.step()
    optimizer.zero_grad()
    return recorder.launches


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        if operator.namespace == "aten" and not _is_view(operator):
            self.launches += _launches(operator, (arguments, options or {}), result)
        return result


def _launches(operator, given, result):
    name = operator.overloadpacket.__name__
    lists = [value for value in _values(given) if _is_list(value)]
    read = sum(_bytes(tensor) for tensor in _tensors(given))
    pairs = zip(given[0], operator._schema.arguments, strict=False)
    changed = [value for value, argument in pairs if _changes(argument)]
    if name.startswith("_fused"):
        # Gradients are changed only where a GradScaler hands over its scale.
        changed = [value for value in changed if value is not given[0][1]]
    written = sum(_bytes(tensor) for tensor in _tensors(changed if changed else result))
    makes_list = not changed and _is_list(result) and not name.endswith("norm")
    count = _of_lists(lists[0], len(lists) + makes_list) if lists and name.startswith(("_foreach", "_fused")) else 1
    shares = [number / count for number in (read, written)]
    return [Launch(name, True, *map(round, shares)) for _ in range(count)]


def _of_lists(tensors, depth) -> int:
    """Launches of a kernel over lists: a new one where its tensors or its chunks are full."""
    large = torch.version.cuda is None or int(torch.version.cuda.partition(".")[0]) >= 13
    most_tensors, most_blocks = _TENSORS[large][depth - 1], _BLOCKS[large]
    launches = held = blocks = 0
    for tensor in tensors:
        held += 1
        chunks = -(-tensor.numel() // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if blocks == most_blocks or (is_last and held == most_tensors):
                launches += 1
                # A tensor whose chunks go on is in the next launch too.
                held, blocks = 0 if is_last else 1, 0
    return launches + (blocks > 0)


def _values(given):
    return [*given[0], *given[1].values()]


def _is_list(value):
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)


def _changes(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(operator):
    schema = operator._schema
    shares = any(value.alias_info is not None for value in schema.returns)
    return shares and not any(map(_changes, schema.arguments))


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor):
    return tensor.numel() * tensor.itemsize
