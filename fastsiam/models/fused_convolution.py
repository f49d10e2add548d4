"""Batch norm, ReLU and the convolution behind them as one step of autograd, which keeps x and not relu(norm(x)).

The backward pass computes relu(norm(x)) a second time, just before the convolution's gradients that read it: for one
more read and write of the images, half of what lies between two convolutions is kept.
"""

from typing import NamedTuple

import torch
from torch import nn

from fastsiam.kernels import batch_norm as kernels
from fastsiam.kernels import batch_norm_numba
from fastsiam.models.fused_norm import below_norm, checked_count, fused_norm, of_ranks, over_ranks


class _Options(NamedTuple):
    eps: float
    momentum: float
    world_size: int
    count: int
    """How many values of all ranks one mean is taken over."""
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def fused_convolution(norm: nn.Module, convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns convolution(relu(norm(x))), images [V*N, C', H', W'] of x's [V*N, C, H, W] and in its dtype.

    `norm` is a per-view batch norm, whose running statistics move. Other convolutions than nn.Conv2d padded with zeros
    and without a bias are called as they are, and their inputs kept; so are all on a CPU, which has the memory and may
    have a faster way (`convolution.use_products`). Errors: as in `fused_norm`.
    """
    if batch_norm_numba.computes(x) or not _is_plain(convolution):
        return convolution(fused_norm([norm], [x], relu=True))
    num_views, world_size = norm.num_views, norm.world_size
    options = _Options(
        eps=norm.eps,
        momentum=norm.momentum,
        world_size=world_size,
        count=checked_count(x, num_views, world_size),
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
    )
    statistics = of_ranks(kernels.statistics_op(x.detach(), num_views, norm.counter), world_size)
    # x has been a convolution's result, and so has the dtype to which autocast casts weights.
    weight = convolution.weight.to(x.dtype)
    running = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return _FusedConvolution.apply(options, x, norm.weight, norm.bias, weight, statistics, norm.counter, *running)


def _is_plain(convolution):
    return (
        type(convolution) is nn.Conv2d
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
        # And not a word for them.
        and isinstance(convolution.padding, tuple)
    )


class _FusedConvolution(torch.autograd.Function):
    """Of its tensors x and the weights and bias have gradients."""

    @staticmethod
    def forward(ctx, options, x, of_norm, bias, weight, statistics, counter, *running):
        z = kernels.apply_op(
            [x], [statistics], [of_norm], [bias], [options.eps], None, True, list(running), [options.momentum],
            options.count,
        )  # fmt: skip
        ctx.save_for_backward(x, of_norm, bias, weight, statistics, counter)
        ctx.options = options
        return torch.conv2d(z, weight, None, options.stride, options.padding, options.dilation, options.groups)

    @staticmethod
    def backward(ctx, grad):
        options = ctx.options
        x, of_norm, bias, weight, statistics, counter = ctx.saved_tensors
        layer = [x], [statistics], [of_norm], [bias], [options.eps]
        z = kernels.apply_again_op(x, statistics, of_norm, bias, options.eps)
        of_z, of_weight, _ = torch.ops.aten.convolution_backward(
            grad, z, weight, None, options.stride, options.padding, options.dilation, False, [0, 0], options.groups,
            [True, ctx.needs_input_grad[4], False],
        )  # fmt: skip
        of_z = of_z.contiguous(memory_format=torch.channels_last)
        (own,) = kernels.reduce_op([of_z], *layer, None, True, counter)
        sums = over_ranks(own, options.world_size)
        of_layer = below_norm(of_z, layer, own, sums, options.count, relu=True)
        return None, *of_layer, of_weight, *[None] * 5
