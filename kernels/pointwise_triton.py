"""Triton kernels of a 1x1 convolution between two batch norms: matrix products over rows of channels.

Images are channels-last, [V*N, H, W, C] in memory: rows of C values. z, the operand that all of them share, is computed
from x wherever it is needed. Products are of the images' dtype and add up in fp32, or in fp64 for fp64. `pointwise.py`
says what each kernel is for and launches it.
"""

import triton
import triton.language as tl

from fastsiam.kernels.batch_norm_triton import _take_in
from fastsiam.kernels.rows_triton import inside, load_rows, store_rows, tile_of_program


@triton.jit
def _of_channels(ptr, kind, view, cols, VIEWS, C: tl.constexpr):
    """Of a tensor [kinds, V, C]."""
    return tl.load(ptr + (kind * VIEWS + view) * C + cols, mask=cols < C, other=0.0)


@triton.jit
def _dot(a, b, acc):
    # fp32 is multiplied as such; for half precisions the word has no meaning.
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _z(x, affine, view, rows, cols, num_rows, VIEWS, C: tl.constexpr):
    """relu(scale x + shift) - relu(bias) in x's dtype; 0 outside."""
    scale, shift = _of_channels(affine, 0, view, cols, VIEWS, C), _of_channels(affine, 1, view, cols, VIEWS, C)
    origin = _of_channels(affine, 2, view, cols, VIEWS, C)
    above = load_rows(x, rows, cols, num_rows, C).to(scale.dtype) * scale[None, :] + shift[None, :]
    # Not a maximum, which would lose NaN.
    z = tl.where(above <= 0.0, 0.0, above) - origin[None, :]
    return tl.where(inside(rows, cols, num_rows, C), z, 0.0).to(x.dtype.element_ty)


@triton.jit
def rows_product_kernel(
    left, x, affine, partial, num_rows, rows_each, VIEWS,
    C_LEFT: tl.constexpr, C: tl.constexpr, LEFTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    GRAM: tl.constexpr,
):  # fmt: skip
    """Sums over some rows of left^T z [C_LEFT, C]; with GRAM left is z, and the sums of z are one more row."""
    ACC: tl.constexpr = partial.dtype.element_ty
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lefts = (block // BLOCKS) * LEFTS + tl.arange(0, LEFTS)
    cols = (block % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    first = part * rows_each
    length, begin = tl.minimum(rows_each, num_rows - first), view.to(tl.int64) * num_rows + first
    acc, total = tl.zeros([LEFTS, COLUMNS], ACC), tl.zeros([COLUMNS], ACC)
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        z = _z(x + begin * C, affine, view, rows, cols, length, VIEWS, C)
        if GRAM:
            total += tl.sum(z.to(ACC), 0)
            # One block holds all channels, or each has two.
            other = z if C <= COLUMNS else _z(x + begin * C, affine, view, rows, lefts, length, VIEWS, C)
        else:
            other = load_rows(left + begin * C_LEFT, rows, lefts, length, C_LEFT)
        acc = _dot(tl.trans(other), z, acc)
    HEIGHT: tl.constexpr = C_LEFT + 1 if GRAM else C_LEFT
    partial += (view.to(tl.int64) * tl.num_programs(1) + part) * HEIGHT * C
    store_rows(partial, acc, lefts, cols, C_LEFT, C)
    if GRAM:  # noqa: SIM102 (a constant, then a number of the GPU's)
        if block // BLOCKS == 0:
            tl.store(partial + C_LEFT * C + cols, total, mask=cols < C)


@triton.jit
def join_kernel(
    x, affine, weight, coefficients, shortcut, y, num_rows, VIEWS,
    C_IN: tl.constexpr, C: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """relu(scale (z weight^T) + shift + shortcut), the shortcut times a third coefficient if NORMED."""
    ACC: tl.constexpr = coefficients.dtype.element_ty
    _, view, cols, begin, length = tile_of_program(num_rows, C, COLUMNS, ROWS)
    rows, acc = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, C_IN, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        z = _z(x + begin * C_IN, affine, view, rows, depth, length, VIEWS, C_IN)
        acc = _dot(z, tl.trans(load_rows(weight, cols, depth, C, C_IN)), acc)
    scale = _of_channels(coefficients, 0, view, cols, VIEWS, C)
    value = acc * scale[None, :] + _of_channels(coefficients, 1, view, cols, VIEWS, C)[None, :]
    carried = load_rows(shortcut + begin * C, rows, cols, length, C).to(ACC)
    if NORMED:
        carried *= _of_channels(coefficients, 2, view, cols, VIEWS, C)[None, :]
    value += carried
    value = tl.where(value <= 0.0, 0.0, value)
    store_rows(y + begin * C, value, rows, cols, length, C)


@triton.jit
def dgrad_kernel(
    grad, x, affine, statistics, of_grad, of_z, offset, g, partial, num_rows, VIEWS,
    C_OUT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """g = grad of_grad + z of_z + offset where relu(scale x + shift) lets it pass; sums of g and g (x - mean)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    tile, view, cols, begin, length = tile_of_program(num_rows, C, COLUMNS, ROWS)
    rows, acc = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], ACC)
    x += begin * C
    for start in range(0, C, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        z = _z(x, affine, view, rows, depth, length, VIEWS, C)
        acc = _dot(z, load_rows(of_z + view * C * C, depth, cols, C, C), acc)
    for start in range(0, C_OUT, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        factor = load_rows(of_grad + view * C_OUT * C, depth, cols, C_OUT, C)
        acc = _dot(load_rows(grad + begin * C_OUT, rows, depth, length, C_OUT), factor, acc)
    acc += _of_channels(offset, 0, view, cols, VIEWS, C)[None, :]
    scale, shift = _of_channels(affine, 0, view, cols, VIEWS, C), _of_channels(affine, 1, view, cols, VIEWS, C)
    value = load_rows(x, rows, cols, length, C).to(ACC)
    rounded = tl.where(value * scale[None, :] + shift[None, :] <= 0.0, 0.0, acc).to(g.dtype.element_ty)
    store_rows(g + begin * C, rounded, rows, cols, length, C)
    # Rows beyond the last have a gradient too, of the offset.
    found = tl.where((rows < length)[:, None], rounded.to(ACC), 0.0)
    away = value - _of_channels(statistics, 0, view, cols, VIEWS, C)[None, :]
    tiles = tl.num_programs(0) // tl.cdiv(C, COLUMNS)
    partial += (view * tiles + tile).to(tl.int64) * 2 * C
    tl.store(partial + cols, tl.sum(found, 0), mask=cols < C)
    tl.store(partial + C + cols, tl.sum(found * away, 0), mask=cols < C)


@triton.jit
def join_dgrad_kernel(
    grad, weight, carried, y, x, statistics, m, partial, num_rows, VIEWS,
    C_IN: tl.constexpr, C: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """m = grad weight + carried where y lets it pass; sums of m and, if NORMED, of m (x - mean)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    KINDS: tl.constexpr = 2 if NORMED else 1
    tile, view, cols, begin, length = tile_of_program(num_rows, C, COLUMNS, ROWS)
    rows, acc = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, C_IN, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        factor = load_rows(weight, depth, cols, C_IN, C)
        acc = _dot(load_rows(grad + begin * C_IN, rows, depth, length, C_IN), factor, acc)
    acc += load_rows(carried + begin * C, rows, cols, length, C).to(ACC)
    # As torch: NaN passes its gradient on.
    rounded = tl.where(load_rows(y + begin * C, rows, cols, length, C) <= 0.0, 0.0, acc).to(m.dtype.element_ty)
    store_rows(m + begin * C, rounded, rows, cols, length, C)
    found = rounded.to(ACC)
    tiles = tl.num_programs(0) // tl.cdiv(C, COLUMNS)
    partial += (view * tiles + tile).to(tl.int64) * KINDS * C
    tl.store(partial + cols, tl.sum(found, 0), mask=cols < C)
    if NORMED:
        mean = _of_channels(statistics, 0, view, cols, VIEWS, C)
        away = load_rows(x + begin * C, rows, cols, length, C).to(ACC) - mean[None, :]
        tl.store(partial + C + cols, tl.sum(found * away, 0), mask=cols < C)


@triton.jit
def take_in_kernel(
    statistics, mean, variance, tracked, count,
    MOMENTUM: tl.constexpr, VIEWS: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _take_in(mean, variance, tracked, statistics, cols, count, MOMENTUM, VIEWS, C, statistics.dtype.element_ty)
