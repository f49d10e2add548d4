"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): blocks of an encoder keep their inputs alone.

In the backward pass a block computes its activations a second time. The second time must leave no trace, and must be
the first one again: batch norm moves its statistics once a step, and divides the batch into as many views as before.
Compiled, this is the compiler's work: it keeps the first pass's changes of buffers and drops those of the second, and
`fastsiam/runtime/kept_activations.py` has it keep the inputs.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastsiam.errors import UserError
from fastsiam.models.batch_norm import view_counts, with_view_counts


def recompute_activations(encoder: nn.Module, name: str) -> nn.Module:
    """Turn each repeated block of `encoder` into one that recomputes in training, in place; returns `encoder`.

    Parameters, buffers and their names stay. `name`: of the encoder, for the `UserError` where it has no such blocks.
    """
    blocks = list(_blocks(encoder))
    if not blocks:
        raise UserError(
            f"train.checkpoint_activations: {name} has no repeated blocks whose activations could be recomputed; set "
            "false, and train.micro_batch where memory does not suffice",
            "nothing-to-recompute",
        )
    for block in blocks:
        block.__class__ = _recomputing(type(block))
    return encoder


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Composite children of nn.Sequential: residual blocks, transformer layers; of nested ones the innermost repeated.

    A Sequential among them is a stage, or a layer with its norm, and is looked into.
    """
    for child in module.children():
        in_sequence = isinstance(module, nn.Sequential) and _is_composite(child)
        if in_sequence and not any(map(_repeats, child.modules())):
            yield child
        else:
            yield from _blocks(child)


def _is_composite(module):
    # timm's batch norm holds the activation behind it.
    return not isinstance(module, nn.Sequential | _BatchNorm) and next(module.children(), None) is not None


def _repeats(module):
    """Whether `module` is a stage: a Sequential with several blocks of one class."""
    if not isinstance(module, nn.Sequential):
        return False
    kinds = Counter(type(child) for child in module if _is_composite(child))
    return max(kinds.values(), default=0) > 1


@functools.cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputing, kind), {"__module__": kind.__module__})


class _Recomputing:
    """Mixin over a block."""

    def forward(self, *inputs, **options):
        if not self.training or not torch.is_grad_enabled():
            return super().forward(*inputs, **options)
        if not torch.compiler.is_compiling():
            options["context_fn"] = functools.partial(_contexts, self)
        return checkpoint(super().forward, *inputs, use_reentrant=False, **options)


def _contexts(block):
    """Contexts of the first pass and of the second; called before the first."""
    return contextlib.nullcontext(), _second_pass(block, view_counts(block))


@contextlib.contextmanager
def _second_pass(block, counts):
    """Buffers are copies, which the pass may change; they are there, for it must keep as many tensors as the first."""
    kept = [(module, dict(module._buffers)) for module in block.modules() if module._buffers]
    for module, buffers in kept:
        module._buffers.update({name: value if value is None else value.clone() for name, value in buffers.items()})
    try:
        with with_view_counts(counts):
            yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
