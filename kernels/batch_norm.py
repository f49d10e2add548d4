"""Training-mode batch norm with what stands around it in a residual network, in four launches a layer.

    statistics       mean and variance of each view and channel      reads x
    apply            relu(norm(x) + norm(shortcut) + residual)       reads these, writes y
    reduce           sums over the gradient                          reads dy and x; at a join y too, and writes g
    apply_backward   dx                                              reads dy or g, and x; writes dx

A fifth, apply_again, gives relu(norm(x)) once more to a backward pass for which it was not kept.

The ReLU's mask is recomputed from x where nothing was added. At a join it is read off y, which the next convolution
keeps anyhow, and the masked gradient g is written: it is the residual's gradient. A join takes the gradients of y's two
users as they come and adds them up itself. The ops are for CUDA; `fastsiam.models.batch_norm` has the formula for other
devices, and the gradient.
"""

import torch
import triton

from fastsiam.kernels.batch_norm_triton import (
    apply_backward_kernel,
    apply_kernel,
    reduce_kernel,
    statistics_kernel,
)

MOST_COLUMNS = 64
# Elements of each tensor that a program holds at a time: 16 a thread.
TILE, NUM_WARPS = 4096, 8
# A reduction keeps its sums for 8 elements a thread, and reads so many rows of them at a time: the more bytes are on
# their way and the less registers hold sums, the nearer is the memory's rate. Programs of four warps with sums of 16
# parts at the end have, on a multiprocessor of an H200, 64 KiB of statistics' reads on their way with Triton 3.8 and 24
# with 3.6, and 56 to 100 and 40 to 80 of the gradients' sums; eight warps and 64 parts have 32 and 16, 48 to 96 and 32
# to 80.
LANES, REDUCTION_WARPS, PARTS_BLOCK = 1024, 4, 16
DEEP, DEEP_STATISTICS = 2, 4
# Programs of a reduction: 8 for each multiprocessor of an H200. Part of the result, so the same on every GPU.
PROGRAMS = 1056


@torch.library.custom_op("fastsiam::batch_norm_statistics", mutates_args=())
def statistics_op(x: torch.Tensor, num_views: int, counter: torch.Tensor | None = None) -> torch.Tensor:
    """[2, V, C]: mean and biased variance of each view of `x` [V*N, C, H, W] or [V*N, C], in max(fp32, its dtype).

    `counter`: `counter_of(x, num_views)`, kept by the caller; it ends as it began.
    """
    grid, shape = _reduction(x, num_views, DEEP_STATISTICS)
    out = x.new_empty((2, num_views, shape["C"]), dtype=_accumulator(x))
    partial = out.new_empty((num_views, grid[1], 2, shape["C"]))
    counter = _counter(counter, x, grid)
    statistics_kernel[grid](x, partial, out, counter, **shape, num_warps=REDUCTION_WARPS)
    return out


@statistics_op.register_fake
def _(x, num_views, counter=None):
    return x.new_empty((2, num_views, x.shape[1]), dtype=_accumulator(x))


@torch.library.custom_op("fastsiam::batch_norm_apply", mutates_args=("running",))
def apply_op(
    xs: list[torch.Tensor], statistics: list[torch.Tensor], weights: list[torch.Tensor], biases: list[torch.Tensor],
    eps: list[float], residual: torch.Tensor | None, relu: bool, running: list[torch.Tensor], momenta: list[float],
    count: int,
) -> torch.Tensor:  # fmt: skip
    """The sum of one or two batch norms of `xs` by their `statistics` [2, V, C], plus `residual`, then ReLU.

    `running`: of each batch norm the running mean and variance [C] and the number of batches, which take in the
    views' statistics in turn, each of `count` values a channel; or empty.
    """
    return _apply(xs, statistics, weights, biases, eps, residual, relu, running, momenta, count)


@apply_op.register_fake
def _(xs, statistics, weights, biases, eps, residual, relu, running, momenta, count):
    return torch.empty_like(xs[0])


def _apply(xs, statistics, weights, biases, eps, residual, relu, running, momenta, count):
    num_views = statistics[0].shape[1]
    grid, shape = _elementwise(xs[0], num_views)
    y = torch.empty_like(xs[0])
    both = 0, -1
    # What is absent is the first tensor, which the kernel then leaves alone.
    running = running or [y] * 3
    apply_kernel[grid](
        *(tensors[i] for tensors in (xs, statistics, weights, biases) for i in both),
        xs[0] if residual is None else residual, y, *running[:3], *running[-3:], count, EPS_A=eps[0], EPS_B=eps[-1],
        MOMENTUM_A=momenta[0] if momenta else 0.0, MOMENTUM_B=momenta[-1] if momenta else 0.0, VIEWS=num_views,
        TWO=len(xs) == 2, RESIDUAL=residual is not None, RELU=relu, RUNNING=bool(momenta), **shape,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


@torch.library.custom_op("fastsiam::batch_norm_apply_again", mutates_args=())
def apply_again_op(
    x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """relu(norm(x)) to the bit as `apply_op` has returned it, for a backward pass; no running statistics move.

    An op of its own: Inductor (torch 2.14) cannot lower one that changes an empty list of tensors.
    """
    return _apply([x], [statistics], [weight], [bias], [eps], None, True, [], [], 0)


@apply_again_op.register_fake
def _(x, statistics, weight, bias, eps):
    return torch.empty_like(x)


@torch.library.custom_op("fastsiam::batch_norm_reduce", mutates_args=())
def reduce_op(
    grads: list[torch.Tensor], xs: list[torch.Tensor], statistics: list[torch.Tensor], weights: list[torch.Tensor],
    biases: list[torch.Tensor], eps: list[float], y: torch.Tensor | None, relu: bool,
    counter: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Sums [1 + len(xs), V, C] of g and of g (x - mean) for each x, where g is the gradient below the ReLU.

    `grads`: of the output's one or two users. With `y`, what `apply_op` has returned, g is returned too, in y's dtype;
    then there may be no x. Without it there is one x and one gradient, and the mask is recomputed.
    """
    num_views, place = statistics[0].shape[1], xs[0] if y is None else y
    grid, shape = _reduction(place, num_views, DEEP)
    sums = statistics[0].new_empty((1 + len(xs), num_views, shape["C"]))
    partial = sums.new_empty((num_views, grid[1], 1 + len(xs), shape["C"]))
    g = [] if y is None else [torch.empty_like(y)]
    counter = _counter(counter, place, grid)
    # What is absent is another tensor, which the kernel then leaves alone.
    x_a, x_b = (xs[0], xs[-1]) if xs else (place, place)
    reduce_kernel[grid](
        grads[0], grads[-1], x_a, x_b, statistics[0], statistics[-1], weights[0], biases[0], place,
        g[0] if g else place, partial, sums, counter, EPS=eps[0], TWO_GRADS=len(grads) == 2, XS=len(xs),
        JOIN=y is not None, RELU=relu, **shape, num_warps=REDUCTION_WARPS,
    )  # fmt: skip
    return [sums, *g]


@reduce_op.register_fake
def _(grads, xs, statistics, weights, biases, eps, y, relu, counter=None):
    sums = statistics[0].new_empty((1 + len(xs), *statistics[0].shape[1:]))
    return [sums] if y is None else [sums, torch.empty_like(y)]


@torch.library.custom_op("fastsiam::batch_norm_apply_backward", mutates_args=())
def apply_backward_op(
    g: torch.Tensor, xs: list[torch.Tensor], statistics: list[torch.Tensor], weights: list[torch.Tensor],
    biases: list[torch.Tensor], eps: list[float], sums: torch.Tensor, own_sums: torch.Tensor, count: int, relu: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradient of each x, then [2, len(xs), C]: those of the biases, and those of the weights.

    `g`: of `reduce_op`, or the gradient above the ReLU with `relu`. `sums`: of all ranks' images, `count` values a
    channel and view; `own_sums`: of this rank's, from which the gradients of weights and biases come.
    """
    num_views = statistics[0].shape[1]
    grid, shape = _elementwise(xs[0], num_views)
    dxs = [torch.empty_like(x) for x in xs]
    of_parameters = sums.new_empty((2, len(xs), shape["C"]))
    apply_backward_kernel[grid](
        g, xs[0], xs[-1], statistics[0], statistics[-1], weights[0], weights[-1], biases[0], sums, own_sums,
        dxs[0], dxs[-1], of_parameters, count, EPS_A=eps[0], EPS_B=eps[-1], VIEWS=num_views, TWO=len(xs) == 2,
        RELU=relu, **shape, num_warps=NUM_WARPS,
    )  # fmt: skip
    return [*dxs, of_parameters]


@apply_backward_op.register_fake
def _(g, xs, statistics, weights, biases, eps, sums, own_sums, count, relu):
    return [*(torch.empty_like(x) for x in xs), sums.new_empty((2, len(xs), xs[0].shape[1]))]


def takes(x: torch.Tensor) -> bool:
    """Whether `x` are images [B, C, H, W] as the kernels take them: on CUDA, channels-last."""
    return x.is_cuda and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def counter_of(num_channels: int, num_views: int, device=None) -> torch.Tensor:
    """Zeros for the programs of a reduction to count in: with it a reduction is one launch and not two.

    For one stream at a time, and any number of views up to `num_views`.
    """
    columns = min(triton.next_power_of_2(num_channels), MOST_COLUMNS)
    return torch.zeros(triton.cdiv(num_channels, columns) * num_views, dtype=torch.int32, device=device)


def _accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


def _counter(counter, x, grid):
    needed = grid[0] * grid[2]
    if counter is not None and counter.numel() >= needed:
        return counter
    return x.new_zeros(needed, dtype=torch.int32)


def _shape(x, num_views, elements):
    channels = x.shape[1]
    columns = min(triton.next_power_of_2(channels), MOST_COLUMNS)
    rows = x.numel() // (channels * num_views)
    return {"num_rows": rows, "C": channels, "COLUMNS": columns, "ROWS": elements // columns}


def _reduction(x, num_views, deep):
    """The grid (blocks of channels, parts of the rows, views), and the kernel's numbers."""
    shape = _shape(x, num_views, LANES)
    blocks, tiles = triton.cdiv(shape["C"], shape["COLUMNS"]), triton.cdiv(shape["num_rows"], deep * shape["ROWS"])
    each = triton.cdiv(tiles * blocks * num_views, PROGRAMS)
    grid = blocks, triton.cdiv(tiles, each), num_views
    return grid, {**shape, "rows_each": each * deep * shape["ROWS"], "DEEP": deep, "PARTS_BLOCK": PARTS_BLOCK}


def _elementwise(x, num_views):
    """The grid (tiles, the channels' blocks of some rows side by side; views), and the kernel's numbers."""
    shape = _shape(x, num_views, TILE)
    tiles = triton.cdiv(shape["C"], shape["COLUMNS"]) * triton.cdiv(shape["num_rows"], shape["ROWS"])
    return (tiles, num_views), shape
