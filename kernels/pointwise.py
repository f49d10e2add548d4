"""A 1x1 convolution between two training-mode batch norms, none of whose two sides is ever in memory.

Of the Bottleneck's tail  u = W relu(bn(x)),  y = relu(bn'(u) + shortcut)  only x and y are. u is linear in
z = relu(bn(x)) - relu(bias of bn), a constant a channel apart from what the convolution takes, and bn' is blind to such
a constant. So bn' has its statistics from z's mean and its Gram matrix z^T z, and its gradient from m^T z, where m is
the gradient below the last ReLU:

    gram         z^T z and sum z, a view           reads x
    join         y                                 reads x and the shortcut; writes y
    rows_product m^T z, a view                     reads m and x
    dgrad        the gradient of bn's output, masked, and its sums; reads m and x; writes it
    join_dgrad   m, of the gradients of y's two users, the next block's first convolution and shortcut, and its sums;
                 reads that convolution's gradient, the shortcut's and y; writes m

The subtraction keeps z's mean within its deviations whatever the bias, so that the Gram matrix loses no digits to it.
What goes on between the launches is of the size of W: `fastsiam.models.fused_pointwise`.
"""

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from fastsiam.kernels import batch_norm
from fastsiam.kernels.pointwise_triton import (
    dgrad_kernel,
    join_dgrad_kernel,
    join_kernel,
    rows_product_kernel,
    take_in_kernel,
)

HALF = (torch.bfloat16, torch.float16)
# Programs of a product over rows: 2 for each multiprocessor of an H200. Part of the result, so the same on every GPU.
PROGRAMS = 264
# Height and width of a tile of the result, the depth of a step, warps. Nothing spills, and two programs of four warps
# fit a multiprocessor, on an A100 and an H200.
TILE_OF_ROWS_PRODUCT = 128, 128, 64, 8
TILE_OF_JOIN = TILE_OF_DGRAD = TILE_OF_JOIN_DGRAD = 64, 128, 64, 4


def takes(x: torch.Tensor) -> bool:
    """Whether `x` are images [B, C, H, W] as the kernels take them: on CUDA, channels-last, in half precision."""
    return batch_norm.takes(x) and x.dtype in HALF


@torch.library.custom_op("fastsiam::pointwise_gram", mutates_args=())
def gram_op(x: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """[V, parts, C + 1, C]: for parts of the rows z^T z, and below it the sums of z.

    `x`: [V*N, C, H, W]. `affine` [3, V, C]: scale, shift and origin, z = relu(scale x + shift) - origin.
    """
    grid, shape = _over_rows(x, affine, x.shape[1])
    partial = affine.new_empty((affine.shape[1], grid[1], x.shape[1] + 1, x.shape[1]))
    rows_product_kernel[grid](x, x, affine, partial, **shape, GRAM=True, num_warps=TILE_OF_ROWS_PRODUCT[3])
    return partial


@gram_op.register_fake
def _(x, affine):
    grid, _ = _over_rows(x, affine, x.shape[1])
    return affine.new_empty((affine.shape[1], grid[1], x.shape[1] + 1, x.shape[1]))


@torch.library.custom_op("fastsiam::pointwise_rows_product", mutates_args=())
def rows_product_op(m: torch.Tensor, x: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """[V, parts, C', C]: m^T z for parts of the rows; `m` [V*N, C', H, W], the others as in `gram_op`."""
    grid, shape = _over_rows(x, affine, m.shape[1])
    partial = affine.new_empty((affine.shape[1], grid[1], m.shape[1], x.shape[1]))
    rows_product_kernel[grid](m, x, affine, partial, **shape, GRAM=False, num_warps=TILE_OF_ROWS_PRODUCT[3])
    return partial


@rows_product_op.register_fake
def _(m, x, affine):
    grid, _ = _over_rows(x, affine, m.shape[1])
    return affine.new_empty((affine.shape[1], grid[1], m.shape[1], x.shape[1]))


@torch.library.custom_op("fastsiam::pointwise_join", mutates_args=())
def join_op(
    x: torch.Tensor, affine: torch.Tensor, weight: torch.Tensor, coefficients: torch.Tensor, shortcut: torch.Tensor
) -> torch.Tensor:
    """relu(a (z weight^T) + b + c shortcut), `weight` [C', C], `shortcut` [V*N, C', H, W].

    `coefficients`: a and b, [2, V, C'], or a, b and c, [3, V, C'].
    """
    y = torch.empty_like(shortcut)
    grid, shape = _tiles(x, affine, weight.shape[0], TILE_OF_JOIN)
    join_kernel[grid](
        x, affine, weight, coefficients, shortcut, y, C_IN=x.shape[1], C=weight.shape[0],
        NORMED=len(coefficients) == 3, **shape,
    )  # fmt: skip
    return y


@join_op.register_fake
def _(x, affine, weight, coefficients, shortcut):
    return torch.empty_like(shortcut)


@torch.library.custom_op("fastsiam::pointwise_dgrad", mutates_args=())
def dgrad_op(
    m: torch.Tensor, x: torch.Tensor, affine: torch.Tensor, statistics: torch.Tensor, of_m: torch.Tensor,
    of_z: torch.Tensor, offset: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """g = m of_m + z of_z + offset, 0 where scale x + shift <= 0, and its sums [V, parts, 2, C] over parts of the rows.

    `of_m` [V, C', C] and `of_z` [V, C, C] in the images' dtype, `offset` [V, C]. The sums are of g and of
    g (x - mean), where `statistics` [2, V, C] begin with the means.
    """
    grid, shape = _tiles(x, affine, x.shape[1], TILE_OF_DGRAD)
    g = torch.empty_like(x)
    partial = affine.new_empty((affine.shape[1], _parts(x, affine, TILE_OF_DGRAD), 2, x.shape[1]))
    dgrad_kernel[grid](
        m, x, affine, statistics, of_m, of_z, offset, g, partial, C_OUT=m.shape[1], C=x.shape[1], **shape
    )
    return [g, partial]


@dgrad_op.register_fake
def _(m, x, affine, statistics, of_m, of_z, offset):
    return [torch.empty_like(x), affine.new_empty((affine.shape[1], _parts(x, affine, TILE_OF_DGRAD), 2, x.shape[1]))]


@torch.library.custom_op("fastsiam::pointwise_join_dgrad", mutates_args=())
def join_dgrad_op(
    grad: torch.Tensor, weight: torch.Tensor, carried: torch.Tensor, y: torch.Tensor, statistics: torch.Tensor,
    x: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    """m = grad weight + carried, 0 where y <= 0, and its sums [V, parts, 1 or 2, C'] over parts of the rows.

    `grad`: of the next convolution's result, [V*N, C, H, W]; `weight` [C, C'] is that convolution's; `carried` and `y`
    [V*N, C', H, W]. With `x`, of y's shape, there are sums of m (x - mean) too, where `statistics` [2, V, C'] begin
    with the means.
    """
    grid, shape = _tiles(grad, statistics, y.shape[1], TILE_OF_JOIN_DGRAD)
    m = torch.empty_like(y)
    kinds = 1 if x is None else 2
    parts = _parts(y, statistics, TILE_OF_JOIN_DGRAD)
    partial = statistics.new_empty((statistics.shape[1], parts, kinds, y.shape[1]))
    join_dgrad_kernel[grid](
        grad, weight, carried, y, y if x is None else x, statistics, m, partial, C_IN=grad.shape[1], C=y.shape[1],
        NORMED=x is not None, **shape,
    )  # fmt: skip
    return [m, partial]


@join_dgrad_op.register_fake
def _(grad, weight, carried, y, statistics, x):
    shape = statistics.shape[1], _parts(y, statistics, TILE_OF_JOIN_DGRAD), 1 if x is None else 2, y.shape[1]
    return [torch.empty_like(y), statistics.new_empty(shape)]


@torch.library.custom_op("fastsiam::batch_norm_take_in", mutates_args=("running",))
def take_in_op(statistics: torch.Tensor, running: list[torch.Tensor], momentum: float, count: int) -> None:
    """Moves running mean and variance [C], and the number of batches, as `batch_norm.apply_op` does."""
    _, num_views, channels = statistics.shape
    columns = min(triton.next_power_of_2(channels), 256)
    take_in_kernel[(triton.cdiv(channels, columns),)](
        statistics, *running, count, MOMENTUM=momentum, VIEWS=num_views, C=channels, COLUMNS=columns
    )


@take_in_op.register_fake
def _(statistics, running, momentum, count):
    return None


def _rows(x, affine):
    return x.numel() // (x.shape[1] * affine.shape[1])


def _side(channels, most):
    """The side of a block of so many channels; the least side of a product is 16."""
    return min(max(triton.next_power_of_2(channels), 16), most)


def _over_rows(x, affine, lefts):
    """The grid (blocks of the result, parts of the rows, views), and the kernel's numbers."""
    channels, num_rows, num_views = x.shape[1], _rows(x, affine), affine.shape[1]
    height, width, depth, _ = TILE_OF_ROWS_PRODUCT
    height, width = _side(lefts, height), _side(channels, width)
    blocks = triton.cdiv(lefts, height) * triton.cdiv(channels, width)
    each = triton.cdiv(num_rows, triton.cdiv(PROGRAMS, blocks * num_views))
    each = triton.cdiv(each, depth) * depth
    grid = blocks, triton.cdiv(num_rows, each), num_views
    shape = {"num_rows": num_rows, "rows_each": each, "VIEWS": num_views, "C_LEFT": lefts, "C": channels}
    return grid, shape | {"LEFTS": height, "COLUMNS": width, "ROWS": depth}


def _parts(x, affine, tile):
    return triton.cdiv(_rows(x, affine), tile[0])


def _tiles(x, affine, channels, tile):
    """The grid (tiles, the columns' blocks of some rows side by side; views), and the kernel's numbers."""
    height, width, depth, num_warps = tile
    num_rows, num_views, width = _rows(x, affine), affine.shape[1], _side(channels, width)
    grid = triton.cdiv(num_rows, height) * triton.cdiv(channels, width), num_views
    shape = {"num_rows": num_rows, "VIEWS": num_views, "ROWS": height, "COLUMNS": width}
    return grid, shape | {"DEPTH": _side(x.shape[1], depth), "num_warps": num_warps}


def _multiply_adds(x, affine, factor):
    return 2 * x[0] * x[2] * x[3] * x[1] * factor


@register_flop_formula(torch.ops.fastsiam.pointwise_gram)
def _(x, affine, *, out_shape=None):
    return _multiply_adds(x, affine, x[1])


@register_flop_formula(torch.ops.fastsiam.pointwise_rows_product)
def _(m, x, affine, *, out_shape=None):
    return _multiply_adds(x, affine, m[1])


@register_flop_formula(torch.ops.fastsiam.pointwise_join)
def _(x, affine, weight, coefficients, shortcut, *, out_shape=None):
    return _multiply_adds(x, affine, weight[0])


@register_flop_formula(torch.ops.fastsiam.pointwise_dgrad)
def _(m, x, *others, out_shape=None):
    return _multiply_adds(x, None, m[1] + x[1])


@register_flop_formula(torch.ops.fastsiam.pointwise_join_dgrad)
def _(grad, weight, *others, out_shape=None):
    return _multiply_adds(grad, None, weight[1])
