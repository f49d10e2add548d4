"""The tail of a Bottleneck, from the 3x3 convolution's result to the next block's first one, as one step of autograd.

    z = relu(bn(x)),  u = W z,  y = relu(bn'(u) + shortcut)

Neither z nor u is written, forward or backward (`fastsiam.kernels.pointwise`). With C = cov(z), bn' has the mean
W mean(z) and the variances diag(W C W^T). Below y's ReLU the gradient m has the sums S1 = sum m and
S2 = sum m (u - mean(u)) = diag((m^T z) W^T) - S1 mean(u), and the gradient of u,

    du = scale (m - S1/n - (u - mean(u)) S2 / (n var)),    scale = weight' / sqrt(var),

is linear in m and z, as are du^T z and du W, the gradients of W and z. All of it is per view.

m is the sum of the gradients of y's two users, masked. The next block's first convolution is one of them, so that the
kernel which computes its gradient can add the other's, mask the sum and add m up.
"""

from typing import NamedTuple

import torch
from torch import nn

from fastsiam.kernels import batch_norm as norm_kernels
from fastsiam.kernels import pointwise as kernels
from fastsiam.models.fused_norm import below_norm, checked_count, of_ranks, over_ranks, takes_kernels


class Shortcut(NamedTuple):
    """A shortcut with a batch norm: its layer, and what goes into it."""

    norm: nn.Module
    x: torch.Tensor


class Begun(NamedTuple):
    """What the next block begins with."""

    inner: torch.Tensor
    """Its first convolution's result."""
    carried: torch.Tensor
    """Its input."""


class _Options(NamedTuple):
    eps: float
    eps_after: float
    eps_shortcut: float | None
    world_size: int
    count: int
    forks: bool


def takes_pointwise(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether `fused_pointwise` takes `x`: as `takes_kernels`, and in half precision."""
    return kernels.takes(x) and takes_kernels(x, *layers)


def is_pointwise(convolution: nn.Module) -> bool:
    """Whether it is a 1x1 convolution of all channels, without a bias."""
    return (
        type(convolution) is nn.Conv2d
        and (convolution.kernel_size, convolution.stride, convolution.groups) == ((1, 1), (1, 1), 1)
        and convolution.padding in ((0, 0), "valid", "same")
        and convolution.bias is None
    )


def fused_pointwise(
    norm: nn.Module,
    convolution: nn.Conv2d,
    after: nn.Module,
    x: torch.Tensor,
    shortcut: torch.Tensor | Shortcut,
    *,
    forks: bool = False,
    following: nn.Conv2d | None = None,
):
    """Returns relu(after(convolution(relu(norm(x)))) + shortcut), images [V*N, C', H, W] of x's [V*N, C, H, W].

    `norm` and `after` are per-view batch norms, whose running statistics move; so does the shortcut's. `forks` and
    errors: as in `fused_norm`. With `following`, a 1x1 convolution of the result, it is `Begun`: the sum of its
    gradient and of the other user's is then part of one kernel.
    """
    num_views, world_size = norm.num_views, norm.world_size
    count = checked_count(x, num_views, world_size)
    tensors = [x, norm.weight, norm.bias, convolution.weight, after.weight, after.bias]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        tensors += _of_forward(norm, _matrix(convolution.weight, x), after, x.detach(), count)
        eps_shortcut = None
        if isinstance(shortcut, Shortcut):
            layer, shortcut = shortcut
            eps_shortcut = layer.eps
            own = norm_kernels.statistics_op(shortcut.detach(), num_views, layer.counter)
            tensors += [layer.weight, layer.bias, of_ranks(own, world_size)]
            _move(layer, tensors[-1], count)
    options = _Options(norm.eps, after.eps, eps_shortcut, world_size, count, forks)
    if following is None:
        return _FusedPointwise.apply(options, shortcut, None, *tensors)
    return Begun(*_FusedPointwise.apply(options, shortcut, following.weight, *tensors))


def _of_forward(norm, weight, after, x, count):
    """What `_Saved` has from `statistics` on; running statistics move."""
    world_size = norm.world_size
    statistics = of_ranks(norm_kernels.statistics_op(x, norm.num_views, norm.counter), world_size)
    _move(norm, statistics, count)
    mean, variance = statistics
    scale, bias = norm.weight * torch.rsqrt(variance + norm.eps), norm.bias.expand_as(mean)
    affine = torch.stack([scale, bias - mean * scale, torch.relu(bias)])
    products = kernels.gram_op(x, affine).sum(1) / (count // world_size)
    mean_of_z, weight = products[:, -1], weight.to(products.dtype)
    covariance = weight @ (products[:, :-1] - mean_of_z[:, :, None] * mean_of_z[:, None, :])
    own_mean = mean_of_z @ weight.T
    variance = (covariance * weight).sum(-1).clamp(min=0)
    of_u = of_ranks(torch.stack([own_mean, variance]), world_size)
    # The running mean is that of W relu(bn(x)), with the constant that z is without.
    _move(after, torch.stack([of_u[0] + affine[2] @ weight.T, of_u[1]]), count)
    return [statistics, affine, of_u, covariance, mean_of_z, own_mean - of_u[0], after.counter]


def _matrix(weight, x):
    """[C', C] in the images' dtype, as a convolution under autocast has it."""
    return weight.flatten(1).to(x.dtype)


def _move(layer, statistics, count):
    running = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    kernels.take_in_op(statistics, running, layer.momentum, count)


class _Saved(NamedTuple):
    x: torch.Tensor
    of_norm: torch.Tensor
    bias_norm: torch.Tensor
    weight: torch.Tensor
    of_after: torch.Tensor
    bias_after: torch.Tensor
    statistics: torch.Tensor
    affine: torch.Tensor
    of_u: torch.Tensor
    """Mean and variance of u, less z's origin, over all ranks."""
    covariance: torch.Tensor
    """[V, C', C], of u and z over this rank's images."""
    mean_of_z: torch.Tensor
    apart: torch.Tensor
    """This rank's mean of u less that of all."""
    counter: torch.Tensor


class _FusedPointwise(torch.autograd.Function):
    """Its tensors: `_Saved` from x on; with a batch norm in the shortcut its weight, bias and statistics."""

    @staticmethod
    def forward(ctx, options, shortcut, following, *tensors):
        x, _, _, weight, of_after, bias = tensors[:6]
        affine, (mean, variance) = tensors[7:9]
        scale = of_after * torch.rsqrt(variance + options.eps_after)
        coefficients, kept = [scale, bias - mean * scale], []
        if options.eps_shortcut is not None:
            of_shortcut, bias, (mean, variance) = tensors[13:]
            third = of_shortcut * torch.rsqrt(variance + options.eps_shortcut)
            coefficients, kept = [scale, coefficients[1] + bias - mean * third, third], [shortcut]
        y = kernels.join_op(x, affine, _matrix(weight, x), torch.stack(coefficients), shortcut)
        ctx.save_for_backward(y, following, *tensors, *kept)
        ctx.options = options
        if following is not None:
            return torch.conv2d(y, following.to(y.dtype)), y
        return (y, y.view_as(y)) if options.forks else y

    @staticmethod
    def backward(ctx, *grads):
        options = ctx.options
        y, following, *saved = ctx.saved_tensors
        saved, more, of_shortcut = _Saved(*saved[:13]), saved[13:], []
        if options.eps_shortcut is not None:
            weight, bias, statistics, images = more
            of_shortcut = [[images], [statistics], [weight], [bias], [options.eps_shortcut]]
        # A mean over places gives each of them the same gradient, a tensor without memory of its own.
        grads = [grad.contiguous(memory_format=torch.channels_last) for grad in grads]
        with torch.autocast(saved.x.device.type, enabled=False):
            own, m, of_following = _through_join(grads, y, following, saved, of_shortcut)
            of_convolution, factors, sums = _through_convolution(saved, options, own, m)
            g, partial = kernels.dgrad_op(m, saved.x, saved.affine, saved.statistics, *factors)
            layer = [saved.x], [saved.statistics], [saved.of_norm], [saved.bias_norm], [options.eps]
            of_z = partial.sum(1).movedim(1, 0).contiguous()
            all_of_z = over_ranks(of_z, options.world_size)
            of_norm = below_norm(g, layer, of_z, all_of_z, options.count, relu=False)
            if not of_shortcut:
                return None, m, of_following, *of_norm, *of_convolution, *[None] * 7
            of_carried, *of_layer = below_norm(m, of_shortcut, own, sums[:2].contiguous(), options.count, relu=False)
        return None, of_carried, of_following, *of_norm, *of_convolution, *[None] * 7, *of_layer, None


def _through_join(grads, y, following, saved, of_shortcut):
    """Sums of m, [1, V, C'], and with a batch norm in the shortcut [2, V, C']; m; the gradient of `following`."""
    if following is None:
        # Without images of its own the mask is all: the other numbers say how many views and channels there are.
        masked = of_shortcut or [[], [saved.of_u], [saved.of_after], [saved.bias_after], [1.0]]
        own, m = norm_kernels.reduce_op(grads, *masked, y, True, saved.counter)
        return own, m, None
    weight, (of_inner, carried) = following.to(y.dtype), grads
    of_following = torch.ops.aten.convolution_backward(
        of_inner, y, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    (x,), (statistics,) = of_shortcut[:2] or ([None], [saved.of_u])
    m, partial = kernels.join_dgrad_op(of_inner, weight.flatten(1), carried, y, statistics, x)
    return partial.sum(1).movedim(1, 0).contiguous(), m, of_following.to(following.dtype)


def _through_convolution(saved, options, own, m):
    """Gradients of the convolution's weight and of the batch norm behind it; `dgrad_op`'s factors; sums of all ranks.

    `own`: of m; with a batch norm in the shortcut, of that one's too. S2 comes behind them.
    """
    product = kernels.rows_product_op(m, saved.x, saved.affine).sum(1)
    weight, (mean, variance) = _matrix(saved.weight, saved.x).to(product.dtype), saved.of_u
    s2 = (product * weight).sum(-1) - own[0] * mean
    sums = over_ranks(torch.cat([own, s2[None]]), options.world_size)
    inverse_std = torch.rsqrt(variance + options.eps_after)
    scale = saved.of_after * inverse_std
    # du = scale m - constant - slope (u - mean)
    constant = scale * sums[0] / options.count
    slope = scale * inverse_std * inverse_std * sums[-1] / options.count
    # Over all ranks du sums to 0, and so z's origin has no part in it.
    number = options.count // options.world_size
    sum_of_z = number * saved.mean_of_z[:, None, :]
    of_z = number * saved.covariance + saved.apart[..., None] * sum_of_z
    of_weight = scale[..., None] * product - constant[..., None] * sum_of_z - slope[..., None] * of_z
    of_parameters = (
        of_weight.sum(0).view_as(saved.weight).to(saved.weight.dtype),
        (inverse_std * s2).sum(0).to(saved.of_after.dtype),
        own[0].sum(0).to(saved.bias_after.dtype),
    )
    of_m, of_z = scale[..., None] * weight, -(weight.T @ (slope[..., None] * weight)).contiguous()
    factors = of_m.to(m.dtype), of_z.to(m.dtype), (slope * mean - constant) @ weight
    return of_parameters, factors, sums
