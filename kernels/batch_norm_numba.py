"""Training-mode batch norm on the CPU, compiled by numba: the four steps of `batch_norm`, one pass over memory each.

torch's own take a pass each for statistics, norm, join of the views, sum and ReLU, forward and backward. Threads share
parts of a fixed size: what is added up, and in which order, does not depend on their number.
"""

import numba
import numpy as np
import torch

from fastsiam.kernels.norm_rows_numba import (
    IN_FP32,
    JIT,
    MOST_CHANNELS,
    ROW,
    fold,
    gradient_of_input,
    hand_on,
    mask_one,
    mask_two,
    normalise,
    normalise_and_add,
    parts_of,
    place_of,
    repeated,
    take_deviations,
    take_gradient,
    take_second,
    tile_of,
    wide,
)
from fastsiam.kernels.threads import as_torch_has


def takes(x: torch.Tensor) -> bool:
    """Whether images are given to these functions for speed: those in bf16 that `computes` names.

    In fp32 torch's batch norm is as fast, and has no second pool of threads: on a CPU with AVX2 the quickstart makes
    0.85 times as many images/s with these functions as without.
    """
    return x.dtype == torch.bfloat16 and computes(x)


def computes(x: torch.Tensor) -> bool:
    """Whether `x` are images [B, C, H, W] as these functions take them: on the CPU, channels-last, in fp32 or bf16.

    Not while a step is compiled: Inductor writes loops of its own.
    """
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] <= MOST_CHANNELS
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def statistics_op(x: torch.Tensor, num_views: int, counter: torch.Tensor | None = None) -> torch.Tensor:
    """[2, V, C] in fp32: mean and biased variance of each view of `x` [V*N, C, H, W].

    `counter` is for the kernels of a GPU.
    """
    channels = x.shape[1]
    values = _values(x, num_views)
    rows = values.shape[1] // channels
    with as_torch_has():
        partial = _statistics(values, channels)
    # Chan, Golub and LeVeque (1983) for parts of unequal size.
    each = parts_of(values.shape[1], channels)[1] // channels
    counts = np.minimum(each, rows - each * np.arange(partial.shape[1]))[:, None]
    means, squares = partial[:, :, 0], partial[:, :, 1]
    # Infinity in an image makes NaN of them, as in torch.
    with np.errstate(invalid="ignore"):
        mean = (means * counts).sum(1) / rows
        variance = (squares + counts * (means - mean[:, None]) ** 2).sum(1) / rows
    return torch.from_numpy(np.stack([mean, variance]).astype(np.float32))


def apply_op(
    xs: list[torch.Tensor], statistics: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor],
    eps: list[float], residual: torch.Tensor | None, relu: bool, running: list[torch.Tensor], momenta: list[float],
    count: int,
) -> torch.Tensor:  # fmt: skip
    """As `batch_norm.apply_op`: the sum of one or two batch norms and `residual`, then ReLU."""
    views = statistics[0].shape[1]
    norms = [_norm(*of_layer) for of_layer in zip(statistics, weights, biases, eps, strict=True)]
    y = torch.empty_like(xs[0])
    images = [_values(x.to(y.dtype), views) for x in (xs[0], xs[-1], xs[0] if residual is None else residual)]
    with as_torch_has():
        _apply(
            *images,
            norms[0],
            norms[-1],
            _values(y, views),
            xs[0].shape[1],
            len(xs) == 2,
            residual is not None,
            _floor(relu),
        )
    for number, momentum in enumerate(momenta):
        _take_in(*running[3 * number : 3 * number + 3], statistics[number], momentum, count)
    return y


def reduce_op(
    grads: list[torch.Tensor], xs: list[torch.Tensor], statistics: list[torch.Tensor], weights: list[torch.Tensor],
    biases: list[torch.Tensor], eps: list[float], y: torch.Tensor | None, relu: bool,
    counter: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """As `batch_norm.reduce_op`: sums [1 + len(xs), V, C] of g and of g (x - mean) for each x; with `y` also g."""
    views, channels = statistics[0].shape[1:]
    norms = [_norm(*of_layer) for of_layer in zip(statistics, weights, biases, eps, strict=True)]
    g = [] if y is None else [torch.empty_like(y)]
    tensors = grads[0], grads[-1], xs[0], xs[-1], *([xs[0], xs[0]] if y is None else [y, *g])
    images = [_values(tensor.to(xs[0].dtype), views) for tensor in tensors]
    with as_torch_has():
        partial = _reduce(
            *images, norms[0], norms[-1], channels, len(grads) == 2, len(xs) == 2, y is not None, _floor(relu)
        )
    sums = partial.sum(1).transpose(1, 0, 2)[: 1 + len(xs)]
    return [torch.from_numpy(sums.astype(np.float32)), *g]


def apply_backward_op(
    g: torch.Tensor, xs: list[torch.Tensor], statistics: list[torch.Tensor], weights: list[torch.Tensor],
    biases: list[torch.Tensor], eps: list[float], sums: torch.Tensor, own_sums: torch.Tensor, count: int, relu: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """As `batch_norm.apply_backward_op`: the gradient of each x, then [2, len(xs), C] of biases and weights."""
    views, channels = statistics[0].shape[1:]
    dxs = [torch.empty_like(x) for x in xs]
    norms, of_weights = [], []
    for number, of_layer in enumerate(zip(statistics, weights, biases, eps, strict=True), 1):
        inverse_std = (of_layer[0][1] + of_layer[3]).rsqrt()
        slope = sums[number] * inverse_std.square() / count
        more = torch.stack([sums[0] / count, slope], 1).numpy()
        norms.append(np.concatenate([_norm(*of_layer), more], 1))
        of_weights.append((own_sums[number] * inverse_std).sum(0))
    images = [_values(tensor.to(xs[0].dtype), views) for tensor in (g, xs[0], xs[-1])]
    with as_torch_has():
        _apply_backward(
            *images,
            norms[0],
            norms[-1],
            _values(dxs[0], views),
            _values(dxs[-1], views),
            channels,
            len(xs) == 2,
            _floor(relu),
        )
    of_biases = own_sums[0].sum(0).expand(len(xs), -1)
    return [*dxs, torch.stack([of_biases, torch.stack(of_weights)])]


def _floor(relu):
    return np.float32(0 if relu else -np.inf)


def _values(images, num_views):
    """[V, N*H*W*C] of channels-last images: fp32, or the bits of bf16."""
    flat = images.detach().permute(0, 2, 3, 1).reshape(num_views, -1)
    return flat.numpy() if flat.dtype == torch.float32 else flat.view(torch.uint16).numpy()


def _norm(statistics, weight, bias, eps):
    """[V, 3, C] in fp32: mean, factor and bias of norm(x) = (x - mean) factor + bias."""
    mean, variance = statistics
    factor = (variance + eps).rsqrt() * weight.detach().float()
    return torch.stack([mean, factor, bias.detach().float().expand_as(mean)], 1).numpy()


def _take_in(mean, variance, batches, statistics, momentum, count):
    """The running statistics take in each view's in turn."""
    batches.add_(statistics.shape[1])
    for of_view, spread in zip(*statistics, strict=True):
        mean.lerp_(of_view.to(mean.dtype), momentum)
        variance.lerp_((spread * (count / (count - 1))).to(variance.dtype), momentum)


@numba.njit(**JIT)
def _statistics_of_part(x, channels, out):
    """`out` [2, C]: the mean of x [n*C], and the sum of squares about it."""
    tile, rows = tile_of(channels), len(x) // channels
    # About the first row, as squares about zero would lose what a small variance is.
    center = np.empty(tile, np.float32)
    for i in range(tile):
        center[i] = wide(x[i % channels])
    sums, totals = np.zeros(2 * ROW, np.float32), np.zeros((2, tile), np.float64)
    for number, at in enumerate(range(0, len(x), tile), 1):
        take_deviations(x[at : at + tile], center, sums)
        if number % IN_FP32 == 0 or at + tile >= len(x):
            hand_on(sums, tile, totals)
    fold(totals, out)
    for channel in range(channels):
        mean = out[0, channel] / rows
        out[1, channel] -= mean * out[0, channel]
        out[0, channel] = center[channel] + mean


@numba.njit(parallel=True, **JIT)
def _statistics(x, channels):
    """[V, parts, 2, C] in fp64 of x [V, n*C]."""
    views, length = x.shape
    _, step, parts = parts_of(length, channels)
    out = np.empty((views * parts, 2, channels), np.float64)
    for number in numba.prange(views * parts):
        view, begin, end = place_of(number, parts, step, length)
        _statistics_of_part(x[view, begin:end], channels, out[number])
    return out.reshape(views, parts, 2, channels)


@numba.njit(parallel=True, **JIT)
def _apply(a, b, added, of_a, of_b, y, channels, two, adds, floor):
    views, length = a.shape
    tile, step, parts = parts_of(length, channels)
    for number in numba.prange(views * parts):
        view, begin, last = place_of(number, parts, step, length)
        first, second = repeated(of_a[view], tile), repeated(of_b[view], tile)
        line = np.empty(tile, np.float32)
        for at in range(begin, last, tile):
            end = min(at + tile, last)
            x, out = a[view, at:end], y[view, at:end]
            if two and adds:
                normalise_and_add(b[view, at:end], second, added[view, at:end], np.float32(-np.inf), line)
            elif two:
                normalise(b[view, at:end], second, np.float32(-np.inf), line)
            if two:
                normalise_and_add(x, first, line, floor, out)
            elif adds:
                normalise_and_add(x, first, added[view, at:end], floor, out)
            else:
                normalise(x, first, floor, out)


@numba.njit(parallel=True, **JIT)
def _reduce(grad, other, a, b, y, g, of_a, of_b, channels, two_grads, two, joined, floor):
    """[V, parts, 3, C] in fp64: sums of g, of g (a - mean) and of g (b - mean); writes `g` where there is a join."""
    views, length = a.shape
    tile, step, parts = parts_of(length, channels)
    out = np.empty((views * parts, 3, channels), np.float64)
    for number in numba.prange(views * parts):
        view, begin, last = place_of(number, parts, step, length)
        first, second = repeated(of_a[view], tile), repeated(of_b[view], tile)
        line, sums, totals = np.empty(tile, np.float32), np.zeros(3 * ROW, np.float32), np.zeros((3, tile), np.float64)
        for at in range(begin, last, tile):
            end = min(at + tile, last)
            x, ours = a[view, at:end], grad[view, at:end]
            if joined:
                if two_grads:
                    mask_two(ours, other[view, at:end], y[view, at:end], floor, line, g[view, at:end])
                else:
                    mask_one(ours, y[view, at:end], floor, line, g[view, at:end])
                take_gradient(line, x, first, np.float32(-np.inf), sums)
                if two:
                    take_second(line, b[view, at:end], second, sums)
            else:
                take_gradient(ours, x, first, floor, sums)
            if (at // tile + 1) % IN_FP32 == 0 or end == last:
                hand_on(sums, tile, totals)
        fold(totals, out[number])
    return out.reshape(views, parts, 3, channels)


@numba.njit(parallel=True, **JIT)
def _apply_backward(g, a, b, of_a, of_b, of_first, of_second, channels, two, floor):
    """`of_first` and `of_second`: the gradients of a and b."""
    views, length = a.shape
    tile, step, parts = parts_of(length, channels)
    for number in numba.prange(views * parts):
        view, begin, last = place_of(number, parts, step, length)
        first, second = repeated(of_a[view], tile), repeated(of_b[view], tile)
        for at in range(begin, last, tile):
            end = min(at + tile, last)
            gradient_of_input(g[view, at:end], a[view, at:end], first, floor, of_first[view, at:end])
            if two:
                gradient_of_input(g[view, at:end], b[view, at:end], second, floor, of_second[view, at:end])
