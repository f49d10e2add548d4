"""Triton kernels of a 1x1 convolution between two batch norms: matrix products over rows of channels.

Images are channels-last, [V*N, H, W, C] in memory: rows of C values. z, the operand that all of them share, is computed
from x wherever it is needed. Products are of the images' dtype and add up in fp32, or in fp64 for fp64. `pointwise.py`
says what each kernel is for and launches it.
"""

import triton
import triton.language as tl

from fastsiam.kernels.batch_norm_triton import _take_in


@triton.jit
def _inside(rows, cols, num_rows, C: tl.constexpr):
    return (rows < num_rows)[:, None] & (cols < C)[None, :]


@triton.jit
def _load(ptr, rows, cols, num_rows, C: tl.constexpr):
    return tl.load(ptr + rows[:, None] * C + cols[None, :], mask=_inside(rows, cols, num_rows, C), other=0.0)


@triton.jit
def _store(ptr, value, rows, cols, num_rows, C: tl.constexpr):
    tl.store(ptr + rows[:, None] * C + cols[None, :], value, mask=_inside(rows, cols, num_rows, C))


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
    above = _load(x, rows, cols, num_rows, C).to(scale.dtype) * scale[None, :] + shift[None, :]
    # Not a maximum, which would lose NaN.
    z = tl.where(above <= 0.0, 0.0, above) - origin[None, :]
    return tl.where(_inside(rows, cols, num_rows, C), z, 0.0).to(x.dtype.element_ty)


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
            other = _load(left + begin * C_LEFT, rows, lefts, length, C_LEFT)
        acc = _dot(tl.trans(other), z, acc)
    HEIGHT: tl.constexpr = C_LEFT + 1 if GRAM else C_LEFT
    partial += (view.to(tl.int64) * tl.num_programs(1) + part) * HEIGHT * C
    _store(partial, acc, lefts, cols, C_LEFT, C)
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
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tile, view = tl.program_id(0) // BLOCKS, tl.program_id(1)
    cols = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    begin, length = view.to(tl.int64) * num_rows + tile * ROWS, num_rows - tile * ROWS
    rows, acc = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, C_IN, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        z = _z(x + begin * C_IN, affine, view, rows, depth, length, VIEWS, C_IN)
        acc = _dot(z, tl.trans(_load(weight, cols, depth, C, C_IN)), acc)
    scale = _of_channels(coefficients, 0, view, cols, VIEWS, C)
    value = acc * scale[None, :] + _of_channels(coefficients, 1, view, cols, VIEWS, C)[None, :]
    carried = _load(shortcut + begin * C, rows, cols, length, C).to(ACC)
    if NORMED:
        carried *= _of_channels(coefficients, 2, view, cols, VIEWS, C)[None, :]
    value += carried
    value = tl.where(value <= 0.0, 0.0, value)
    _store(y + begin * C, value.to(y.dtype.element_ty), rows, cols, length, C)


@triton.jit
def dgrad_kernel(
    grad, x, affine, statistics, of_grad, of_z, offset, g, partial, num_rows, VIEWS,
    C_OUT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """g = grad of_grad + z of_z + offset where relu(scale x + shift) lets it pass; sums of g and g (x - mean)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tile, view = tl.program_id(0) // BLOCKS, tl.program_id(1)
    cols = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    begin, length = view.to(tl.int64) * num_rows + tile * ROWS, num_rows - tile * ROWS
    rows, acc = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], ACC)
    x += begin * C
    for start in range(0, C, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        z = _z(x, affine, view, rows, depth, length, VIEWS, C)
        acc = _dot(z, _load(of_z + view * C * C, depth, cols, C, C), acc)
    for start in range(0, C_OUT, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        factor = _load(of_grad + view * C_OUT * C, depth, cols, C_OUT, C)
        acc = _dot(_load(grad + begin * C_OUT, rows, depth, length, C_OUT), factor, acc)
    acc += _of_channels(offset, 0, view, cols, VIEWS, C)[None, :]
    scale, shift = _of_channels(affine, 0, view, cols, VIEWS, C), _of_channels(affine, 1, view, cols, VIEWS, C)
    value = _load(x, rows, cols, length, C).to(ACC)
    rounded = tl.where(value * scale[None, :] + shift[None, :] <= 0.0, 0.0, acc).to(g.dtype.element_ty)
    _store(g + begin * C, rounded, rows, cols, length, C)
    # Rows beyond the last have a gradient too, of the offset.
    found = tl.where((rows < length)[:, None], rounded.to(ACC), 0.0)
    away = value - _of_channels(statistics, 0, view, cols, VIEWS, C)[None, :]
    tiles = tl.num_programs(0) // BLOCKS
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
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    KINDS: tl.constexpr = 2 if NORMED else 1
    tile, view = tl.program_id(0) // BLOCKS, tl.program_id(1)
    cols = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    begin, length = view.to(tl.int64) * num_rows + tile * ROWS, num_rows - tile * ROWS
    rows, acc = tl.arange(0, ROWS), tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, C_IN, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        factor = _load(weight, depth, cols, C_IN, C)
        acc = _dot(_load(grad + begin * C_IN, rows, depth, length, C_IN), factor, acc)
    acc += _load(carried + begin * C, rows, cols, length, C).to(ACC)
    # As torch: NaN passes its gradient on.
    rounded = tl.where(_load(y + begin * C, rows, cols, length, C) <= 0.0, 0.0, acc).to(m.dtype.element_ty)
    _store(m + begin * C, rounded, rows, cols, length, C)
    found = rounded.to(ACC)
    tiles = tl.num_programs(0) // BLOCKS
    partial += (view * tiles + tile).to(tl.int64) * KINDS * C
    tl.store(partial + cols, tl.sum(found, 0), mask=cols < C)
    if NORMED:
        mean = _of_channels(statistics, 0, view, cols, VIEWS, C)
        away = _load(x + begin * C, rows, cols, length, C).to(ACC) - mean[None, :]
        tl.store(partial + C + cols, tl.sum(found * away, 0), mask=cols < C)


@triton.jit
def take_in_kernel(
    statistics, mean, variance, tracked, count,
    MOMENTUM: tl.constexpr, VIEWS: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _take_in(mean, variance, tracked, statistics, cols, count, MOMENTUM, VIEWS, C, statistics.dtype.element_ty)
