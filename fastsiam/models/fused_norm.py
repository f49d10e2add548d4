"""Batch norm, the sum at a join and ReLU as one step of autograd, by the kernels of `fastsiam.kernels.batch_norm`.

On a CPU by those of `fastsiam.kernels.batch_norm_numba`, in eager mode.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from fastsiam.kernels import batch_norm as kernels
from fastsiam.kernels import batch_norm_numba
from fastsiam.runtime.gather import of_all_ranks


class _Options(NamedTuple):
    """Numbers of the layers, alike for both but for `eps` and `momenta`."""

    eps: list[float]
    momenta: list[float]
    world_size: int
    count: int
    """How many values of all ranks one mean is taken over."""
    relu: bool
    is_join: bool
    forks: bool
    on_cpu: bool

    @property
    def kernels(self):
        return batch_norm_numba if self.on_cpu else kernels


def takes_kernels(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether `fused_norm` takes `x`: channels-last images for batch norms in training, a CPU's in bf16 and eagerly."""
    most = batch_norm_numba.MOST_CHANNELS if x.device.type == "cpu" else math.inf
    return (kernels.takes(x) or batch_norm_numba.takes(x)) and all(
        # Per-view layers with weights have one.
        getattr(layer, "counter", None) is not None
        and layer.training
        and layer.num_batches_tracked is not None
        and layer.momentum is not None
        and layer.num_features <= most
        for layer in layers
    )


def fused_norm(
    layers: list[nn.Module],
    xs: list[torch.Tensor],
    residual: torch.Tensor | None = None,
    *,
    relu: bool = False,
    forks: bool = False,
):
    """Returns the sum of `layers` of `xs`, one or two of one shape [V*N, C, H, W], and `residual`; then ReLU.

    The layers are per-view batch norms, whose running statistics move. `forks`: the result twice, for two users whose
    gradients are then added up in the kernel that reads them, rather than by one of their own. Sums need `relu`. Raises
    `ValueError` where the batch does not divide into the views, or a channel has a single value.
    """
    num_views, world_size = layers[0].num_views, layers[0].world_size
    count = checked_count(xs[0], num_views, world_size)
    options = _Options(
        eps=[layer.eps for layer in layers],
        momenta=[layer.momentum for layer in layers],
        world_size=world_size,
        count=count,
        relu=relu,
        is_join=residual is not None or len(xs) == 2,
        forks=forks,
        on_cpu=batch_norm_numba.computes(xs[0]),
    )
    tensors = []
    for layer, x in zip(layers, xs, strict=True):
        statistics = of_ranks(options.kernels.statistics_op(x.detach(), num_views, layer.counter), world_size)
        running = layer.running_mean, layer.running_var, layer.num_batches_tracked
        tensors += [x, layer.weight, layer.bias, statistics, layer.counter, *running]
    return _FusedNorm.apply(options, residual, *tensors)


def checked_count(x: torch.Tensor, num_views: int, world_size: int) -> int:
    """Returns how many values of all ranks one mean of `x` is taken over; raises `ValueError` as `fused_norm` does."""
    if x.shape[0] % num_views:
        raise ValueError(f"batch norm: a batch of {x.shape[0]} does not divide into {num_views} views")
    count = world_size * x.numel() // (num_views * x.shape[1])
    if count < 2:
        raise ValueError(f"batch norm: one value a channel and view in {list(x.shape)}; it needs at least 2")
    return count


def of_ranks(statistics: torch.Tensor, world_size: int) -> torch.Tensor:
    """Returns [2, V, C] of all ranks' images, who have equally many: Chan, Golub and LeVeque's formula (1983)."""
    if world_size == 1:
        return statistics
    means, variances = of_all_ranks(statistics, world_size).unbind(1)
    between, mean = torch.var_mean(means, dim=0, correction=0)
    return torch.stack([mean, variances.mean(0) + between])


def over_ranks(own: torch.Tensor, world_size: int) -> torch.Tensor:
    """Returns the sum over all ranks of sums over a rank's own images."""
    return own if world_size == 1 else of_all_ranks(own, world_size).sum(0)


def below_norm(
    g: torch.Tensor, layer: tuple, own: torch.Tensor, sums: torch.Tensor, count: int, *, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of one batch norm's images, weight and bias.

    As `apply_backward_op` has them: `layer`, which is its five lists, of one each, and the rest.
    """
    dx, of_parameters = kernels.apply_backward_op(g, *layer, sums, own, count, relu)
    of_bias, of_weight = of_parameters[:, 0].unbind()
    (weight,), (bias,) = layer[2:4]
    return dx, of_weight.to(weight.dtype), of_bias.to(bias.dtype)


class _FusedNorm(torch.autograd.Function):
    """Of each layer's eight tensors x, weight and bias have gradients."""

    @staticmethod
    def forward(ctx, options, residual, *tensors):
        xs, weights, biases, statistics, counters, *running = (list(tensors[i::8]) for i in range(8))
        running = [tensor for of_layer in zip(*running, strict=True) for tensor in of_layer]
        y = options.kernels.apply_op(
            xs, statistics, weights, biases, options.eps, residual, options.relu, running, options.momenta,
            options.count,
        )  # fmt: skip
        kept = [y] if options.is_join else []
        ctx.save_for_backward(*xs, *weights, *biases, *statistics, counters[0], *kept)
        ctx.options, ctx.has_residual = options, residual is not None
        return (y, y.view_as(y)) if options.forks else y

    @staticmethod
    def backward(ctx, *grads):
        options, size = ctx.options, len(ctx.options.eps)
        saved = list(ctx.saved_tensors)
        xs, weights, biases, statistics = (saved[i * size : (i + 1) * size] for i in range(4))
        counter, y = saved[4 * size], saved[4 * size + 1] if options.is_join else None
        # A mean over places gives each of them the same gradient, a tensor without memory of its own.
        grads = [grad.contiguous(memory_format=torch.channels_last) for grad in grads]
        of_layers = xs, statistics, weights, biases, options.eps
        if len(grads) == 2 and not options.is_join:
            grads = [grads[0] + grads[1]]
        own_sums, *joined = options.kernels.reduce_op(grads, *of_layers, y, options.relu, counter)
        sums = over_ranks(own_sums, options.world_size)
        g = joined[0] if options.is_join else grads[0]
        relu = options.relu and not options.is_join
        *dxs, of_parameters = options.kernels.apply_backward_op(g, *of_layers, sums, own_sums, options.count, relu)
        of_layer = []
        for number, (dx, weight, bias) in enumerate(zip(dxs, weights, biases, strict=True)):
            of_bias, of_weight = of_parameters[:, number].unbind()
            of_layer += [dx, of_weight.to(weight.dtype), of_bias.to(bias.dtype), *[None] * 5]
        return None, g if ctx.has_residual else None, *of_layer
