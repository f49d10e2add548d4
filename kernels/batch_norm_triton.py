"""Triton kernels of training-mode batch norm with what stands around it in a residual network.

Images are channels-last, [V*N, H, W, C] in memory: rows of C values. A reduction is one launch: its programs count how
many of them are done, and the last one of some channels adds up, in the same order every time. All arithmetic is fp32,
or fp64 for fp64. `batch_norm.py` says what each of them is for and launches them.
"""

import triton
import triton.language as tl

from fastsiam.kernels.rows_triton import load_rows, store_rows, tile_of_program


@triton.jit
def _deep_rows(start, ROWS: tl.constexpr, DEEP: tl.constexpr):
    """[DEEP, ROWS]: a thread has the DEEP rows of its columns, and adds them up without the others."""
    return start + tl.arange(0, DEEP)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]


@triton.jit
def _load_deep(ptr, rows, cols, num_rows, C: tl.constexpr, ACC: tl.constexpr):
    mask = (rows < num_rows)[:, :, None] & (cols < C)[None, None, :]
    return tl.load(ptr + rows[:, :, None] * C + cols[None, None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _of_channels(ptr, view, cols, C: tl.constexpr, ACC: tl.constexpr):
    return tl.load(ptr + view * C + cols, mask=cols < C, other=0.0).to(ACC)


@triton.jit
def _mean_and_inverse_std(statistics, view, cols, EPS: tl.constexpr, VIEWS, C: tl.constexpr, ACC: tl.constexpr):
    mean = _of_channels(statistics, view, cols, C, ACC)
    variance = _of_channels(statistics, VIEWS + view, cols, C, ACC)
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def _is_last(counter, parts):
    """Whether this program is the last of its channels and view; the counter is zero again behind it."""
    tl.debug_barrier()
    place = counter + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    last = tl.atomic_add(place, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(place, 0)
    return last


@triton.jit
def statistics_kernel(
    x, partial, out, counter, num_rows, rows_each,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and deviations of DEEP rows at a time, joined by the formula of Chan, Golub and LeVeque (1983)."""
    ACC: tl.constexpr = out.dtype.element_ty
    cols, view, part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(2), tl.program_id(1)
    first = part * rows_each
    length = tl.minimum(rows_each, num_rows - first)
    x += (view.to(tl.int64) * num_rows + first) * C
    mean, m2 = tl.zeros([ROWS, COLUMNS], ACC), tl.zeros([ROWS, COLUMNS], ACC)
    seen = tl.zeros([ROWS], ACC)
    for start in range(0, length, DEEP * ROWS):
        rows = _deep_rows(start, ROWS, DEEP)
        value = _load_deep(x, rows, cols, length, C, ACC)
        inside = rows < length
        new = tl.sum(inside.to(ACC), 0)
        mean_of_new = tl.sum(value, 0) / tl.maximum(new, 1.0)[:, None]
        away = tl.where(inside[:, :, None], value - mean_of_new[None, :, :], 0.0)
        seen += new
        delta, share = mean_of_new - mean, (new / tl.maximum(seen, 1.0))[:, None]
        mean += delta * share
        m2 += tl.sum(away * away, 0) + delta * delta * share * (seen - new)[:, None]
    seen_by = seen[:, None]
    # Twice, the second time from the first result: a large mean would lose its last digits in one sum.
    of_part = tl.sum(mean * seen_by, 0) / length
    away = mean - of_part[None, :]
    moved = tl.sum(away * seen_by, 0) / length
    m2_of_part = tl.sum(m2 + seen_by * away * away, 0) - length * moved * moved
    of_part += moved

    parts = tl.num_programs(1)
    partial += view.to(tl.int64) * parts * 2 * C
    tl.store(partial + part * 2 * C + cols, of_part, mask=cols < C)
    tl.store(partial + part * 2 * C + C + cols, m2_of_part, mask=cols < C)
    if _is_last(counter, parts):
        number = tl.arange(0, PARTS_BLOCK)
        total = tl.zeros([PARTS_BLOCK, COLUMNS], ACC)
        for start in range(0, parts, PARTS_BLOCK):
            weight = _rows_of(start + number, parts, rows_each, num_rows, ACC)
            total += _partial(partial, start + number, 0, cols, parts, 2, C) * weight
        of_view = tl.sum(total, 0) / num_rows
        total, squares = tl.zeros([PARTS_BLOCK, COLUMNS], ACC), tl.zeros([PARTS_BLOCK, COLUMNS], ACC)
        for start in range(0, parts, PARTS_BLOCK):
            weight = _rows_of(start + number, parts, rows_each, num_rows, ACC)
            apart = _partial(partial, start + number, 0, cols, parts, 2, C) - of_view[None, :]
            total += apart * weight
            squares += _partial(partial, start + number, 1, cols, parts, 2, C) + weight * apart * apart
        moved, views = tl.sum(total, 0) / num_rows, tl.num_programs(2)
        variance = tl.sum(squares, 0) / num_rows - moved * moved
        tl.store(out + view * C + cols, of_view + moved, mask=cols < C)
        tl.store(out + (views + view) * C + cols, tl.where(variance < 0.0, 0.0, variance), mask=cols < C)


@triton.jit
def _rows_of(part, parts, rows_each, num_rows, ACC: tl.constexpr):
    return tl.where(part < parts, tl.minimum(rows_each, num_rows - part * rows_each), 0).to(ACC)[:, None]


@triton.jit
def _partial(partial, part, kind, cols, parts, KINDS: tl.constexpr, C: tl.constexpr):
    # .cg reads from L2: the other programs' sums are not in this processor's L1.
    places = (part * KINDS + kind)[:, None] * C + cols[None, :]
    mask = (part < parts)[:, None] & (cols < C)[None, :]
    return tl.load(partial + places, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _take_in(
    mean_ptr, variance_ptr, tracked, statistics, cols, count,
    MOMENTUM: tl.constexpr, VIEWS: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Running statistics as V calls of F.batch_norm leave them: the variance unbiased."""
    mean, variance = _of_channels(mean_ptr, 0, cols, C, ACC), _of_channels(variance_ptr, 0, cols, C, ACC)
    # As a quotient of two integers it would not be fp64.
    unbiased = count.to(ACC) / (count - 1).to(ACC)
    for view in range(VIEWS):
        mean += MOMENTUM * (_of_channels(statistics, view, cols, C, ACC) - mean)
        variance += MOMENTUM * (_of_channels(statistics, VIEWS + view, cols, C, ACC) * unbiased - variance)
    tl.store(mean_ptr + cols, mean.to(mean_ptr.dtype.element_ty), mask=cols < C)
    tl.store(variance_ptr + cols, variance.to(variance_ptr.dtype.element_ty), mask=cols < C)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + VIEWS)


@triton.jit
def apply_kernel(
    x_a, x_b, statistics_a, statistics_b, weight_a, weight_b, bias_a, bias_b, residual, y,
    mean_a, variance_a, tracked_a, mean_b, variance_b, tracked_b, count, num_rows,
    EPS_A: tl.constexpr, EPS_B: tl.constexpr, MOMENTUM_A: tl.constexpr, MOMENTUM_B: tl.constexpr,
    VIEWS: tl.constexpr, TWO: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, RUNNING: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = statistics_a.dtype.element_ty
    tile, view, cols, first, left = tile_of_program(num_rows, C, COLUMNS, ROWS)
    if RUNNING:  # noqa: SIM102 (a constant, then a number of the GPU's)
        if (tile == 0) & (view == 0):
            _take_in(mean_a, variance_a, tracked_a, statistics_a, cols, count, MOMENTUM_A, VIEWS, C, ACC)
            if TWO:
                _take_in(mean_b, variance_b, tracked_b, statistics_b, cols, count, MOMENTUM_B, VIEWS, C, ACC)
    begin, rows = first * C, tl.arange(0, ROWS)
    value = _normalised(x_a + begin, statistics_a, weight_a, bias_a, view, rows, cols, left, EPS_A, VIEWS, C, ACC)
    if TWO:
        value += _normalised(x_b + begin, statistics_b, weight_b, bias_b, view, rows, cols, left, EPS_B, VIEWS, C, ACC)
    if RESIDUAL:
        value += load_rows(residual + begin, rows, cols, left, C).to(ACC)
    if RELU:
        # Not a maximum, which would lose NaN.
        value = tl.where(value <= 0.0, 0.0, value)
    store_rows(y + begin, value, rows, cols, left, C)


@triton.jit
def _normalised(
    x, statistics, weight, bias, view, rows, cols, left,
    EPS: tl.constexpr, VIEWS: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    mean, inverse_std = _mean_and_inverse_std(statistics, view, cols, EPS, VIEWS, C, ACC)
    scale, shift = inverse_std * _of_channels(weight, 0, cols, C, ACC), _of_channels(bias, 0, cols, C, ACC)
    return (load_rows(x, rows, cols, left, C).to(ACC) - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def reduce_kernel(
    grad_a, grad_b, x_a, x_b, statistics_a, statistics_b, weight, bias, y, g, partial, sums, counter,
    num_rows, rows_each, EPS: tl.constexpr,
    TWO_GRADS: tl.constexpr, XS: tl.constexpr, JOIN: tl.constexpr, RELU: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = sums.dtype.element_ty
    KINDS: tl.constexpr = 1 + XS
    cols, view, part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(2), tl.program_id(1)
    views, parts = tl.num_programs(2), tl.num_programs(1)
    length = tl.minimum(rows_each, num_rows - part * rows_each)
    begin = (view.to(tl.int64) * num_rows + part * rows_each) * C
    mean_a, inverse_std = _mean_and_inverse_std(statistics_a, view, cols, EPS, views, C, ACC)
    scale, shift = inverse_std * _of_channels(weight, 0, cols, C, ACC), _of_channels(bias, 0, cols, C, ACC)
    mean_b = _of_channels(statistics_b, view, cols, C, ACC)
    of_g, of_a = tl.zeros([ROWS, COLUMNS], ACC), tl.zeros([ROWS, COLUMNS], ACC)
    of_b = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, length, DEEP * ROWS):
        rows = _deep_rows(start, ROWS, DEEP)
        grad = _load_deep(grad_a + begin, rows, cols, length, C, ACC)
        if TWO_GRADS:
            grad += _load_deep(grad_b + begin, rows, cols, length, C, ACC)
        if XS > 0:
            away = _load_deep(x_a + begin, rows, cols, length, C, ACC) - mean_a[None, None, :]
        if RELU:
            if JOIN:
                above = _load_deep(y + begin, rows, cols, length, C, ACC)
            else:
                above = away * scale[None, None, :] + shift[None, None, :]
            # As torch: NaN passes its gradient on.
            grad = tl.where(above <= 0.0, 0.0, grad)
        if JOIN:
            rounded = grad.to(g.dtype.element_ty)
            mask = (rows < length)[:, :, None] & (cols < C)[None, None, :]
            tl.store(g + begin + rows[:, :, None] * C + cols[None, None, :], rounded, mask=mask)
            grad = rounded.to(ACC)
        of_g += tl.sum(grad, 0)
        if XS > 0:
            of_a += tl.sum(grad * away, 0)
        if XS > 1:
            away = _load_deep(x_b + begin, rows, cols, length, C, ACC) - mean_b[None, None, :]
            of_b += tl.sum(grad * away, 0)
    partial += view.to(tl.int64) * parts * KINDS * C
    mine = partial + part * KINDS * C + cols
    tl.store(mine, tl.sum(of_g, 0), mask=cols < C)
    if XS > 0:
        tl.store(mine + C, tl.sum(of_a, 0), mask=cols < C)
    if XS > 1:
        tl.store(mine + 2 * C, tl.sum(of_b, 0), mask=cols < C)
    if _is_last(counter, parts):
        for kind in tl.static_range(KINDS):
            total = tl.zeros([PARTS_BLOCK, COLUMNS], ACC)
            for start in range(0, parts, PARTS_BLOCK):
                total += _partial(partial, start + tl.arange(0, PARTS_BLOCK), kind, cols, parts, KINDS, C)
            tl.store(sums + (kind * views + view) * C + cols, tl.sum(total, 0), mask=cols < C)


@triton.jit
def apply_backward_kernel(
    g, x_a, x_b, statistics_a, statistics_b, weight_a, weight_b, bias, sums, own_sums, dx_a, dx_b, of_parameters,
    count, num_rows, EPS_A: tl.constexpr, EPS_B: tl.constexpr,
    VIEWS: tl.constexpr, TWO: tl.constexpr, RELU: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (g - mean(g) - x_hat mean(g x_hat)) weight / std, where x_hat = (x - mean) / std."""
    ACC: tl.constexpr = statistics_a.dtype.element_ty
    tile, view, cols, first, left = tile_of_program(num_rows, C, COLUMNS, ROWS)
    if (tile == 0) & (view == 0):
        _of_parameters(of_parameters, own_sums, statistics_a, statistics_b, cols, EPS_A, EPS_B, VIEWS, TWO, C, ACC)
    begin, rows = first * C, tl.arange(0, ROWS)
    grad, share = load_rows(g + begin, rows, cols, left, C).to(ACC), 1.0 / count.to(ACC)
    mean, inverse_std = _mean_and_inverse_std(statistics_a, view, cols, EPS_A, VIEWS, C, ACC)
    away, scale = load_rows(x_a + begin, rows, cols, left, C).to(ACC) - mean[None, :], inverse_std
    scale *= _of_channels(weight_a, 0, cols, C, ACC)
    if RELU:
        above = away * scale[None, :] + _of_channels(bias, 0, cols, C, ACC)[None, :]
        grad = tl.where(above <= 0.0, 0.0, grad)
    grad -= (_of_channels(sums, view, cols, C, ACC) * share)[None, :]
    slope = _of_channels(sums, VIEWS + view, cols, C, ACC) * share * inverse_std * inverse_std
    store_rows(dx_a + begin, (grad - away * slope[None, :]) * scale[None, :], rows, cols, left, C)
    if TWO:
        mean, inverse_std = _mean_and_inverse_std(statistics_b, view, cols, EPS_B, VIEWS, C, ACC)
        away, scale = load_rows(x_b + begin, rows, cols, left, C).to(ACC) - mean[None, :], inverse_std
        scale *= _of_channels(weight_b, 0, cols, C, ACC)
        slope = _of_channels(sums, 2 * VIEWS + view, cols, C, ACC) * share * inverse_std * inverse_std
        store_rows(dx_b + begin, (grad - away * slope[None, :]) * scale[None, :], rows, cols, left, C)


@triton.jit
def _of_parameters(
    out, sums, statistics_a, statistics_b, cols, EPS_A: tl.constexpr, EPS_B: tl.constexpr,
    VIEWS: tl.constexpr, TWO: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    of_bias, of_a, of_b = tl.zeros([cols.shape[0]], ACC), tl.zeros([cols.shape[0]], ACC), tl.zeros([cols.shape[0]], ACC)
    for view in range(VIEWS):
        of_bias += _of_channels(sums, view, cols, C, ACC)
        _, inverse_std = _mean_and_inverse_std(statistics_a, view, cols, EPS_A, VIEWS, C, ACC)
        of_a += _of_channels(sums, VIEWS + view, cols, C, ACC) * inverse_std
        if TWO:
            _, inverse_std = _mean_and_inverse_std(statistics_b, view, cols, EPS_B, VIEWS, C, ACC)
            of_b += _of_channels(sums, 2 * VIEWS + view, cols, C, ACC) * inverse_std
    # Each layer has a bias gradient of its own, though they are equal: gradients are added up in place.
    LAYERS: tl.constexpr = 2 if TWO else 1
    tl.store(out + cols, of_bias, mask=cols < C)
    tl.store(out + LAYERS * C + cols, of_a, mask=cols < C)
    if TWO:
        tl.store(out + C + cols, of_bias, mask=cols < C)
        tl.store(out + 3 * C + cols, of_b, mask=cols < C)
