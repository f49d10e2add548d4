"""Triton kernels of the log-sum-exp of similarities: no similarity leaves the processor that computes it.

Each program holds some rows and goes through a part of the columns, which come from L2. Both directions compute the
similarities anew, so that memory holds the rows, their log-sum-exp and their gradients only.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 64, 32
NUM_WARPS = 4
# The products split their operands in registers: elements of a row that one takes at once, and that a program of the
# backward holds a gradient of. Loads in flight for the next round (stages) would need more shared memory than there is.
SLICE = 32
MOST_DEPTH = 128
NUM_STAGES = 1
# Programs are so many at least, by parts of the columns: two for each of the 132 multiprocessors of an H200.
PROGRAMS = 264
# Three products of TF32 (11 bits each) that give fp32's 24; fp32 itself has no tensor cores.
PRECISION = tl.constexpr("tf32x3")
LOG2_E = tl.constexpr(1.4426950408889634)


def forward(z, temperature):
    """log sum_{k != i} exp(z_i.z_k / T) [N] over unit rows z [N, D] in fp32."""
    return forward_between(z, z, temperature, torch.arange(len(z), device=z.device))


def backward(grad, z, temperature, lse):
    """The gradient of z [N, D] where that of `forward` is `grad` [N]."""
    own = torch.arange(len(z), device=z.device)
    return _gradient(grad, z, z, temperature, own, lse, by_row=True, by_column=True)


def forward_between(queries, keys, temperature, own):
    """log sum_j exp(q_i.k_j / T) [n] over all keys [M, D] but key own[i], of each query [n, D]; `own` may be None."""
    num_rows, num_columns = len(queries), len(keys)
    parts, columns = _parts(num_rows, num_columns)
    of_parts = queries.new_empty((parts, num_rows))
    _forward_kernel[(triton.cdiv(num_rows, ROWS), parts)](
        queries, keys, temperature, of_parts, own, num_rows, num_columns, columns,
        D=queries.shape[1], HAS_OWN=own is not None, ROWS=ROWS, COLUMNS=COLUMNS, SLICE=SLICE,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return of_parts[0] if parts == 1 else of_parts.logsumexp(0)


def backward_between(grad, queries, keys, temperature, own, lse, to_queries=True, to_keys=True):
    """The gradients of queries and keys where that of `forward_between` is `grad` [n]; None for what is not asked."""
    of_queries = of_keys = None
    if to_queries:
        of_queries = _gradient(grad, queries, keys, temperature, own, lse, by_row=True, by_column=False)
    if to_keys:
        of_keys = _gradient(grad, keys, queries, temperature, own, lse, by_row=False, by_column=True)
    return of_queries, of_keys


def _gradient(grad, rows, columns, temperature, own, lse, by_row, by_column):
    """Gradient of `rows`; `by_row` where they are anchors, `by_column` where `columns` are, both where they are one."""
    (num_rows, dim), num_columns, depth = rows.shape, len(columns), _depth(rows.shape[1])
    pieces = triton.cdiv(dim, depth)
    parts, columns_each = _parts(num_rows * pieces, num_columns)
    out = rows.new_empty((parts, num_rows, dim))
    _backward_kernel[(triton.cdiv(num_rows, ROWS), parts, pieces)](
        rows, columns, temperature, grad, lse, out, own, num_rows, num_columns, columns_each,
        D=dim, HAS_OWN=own is not None, BY_ROW=by_row, BY_COLUMN=by_column, ROWS=ROWS, COLUMNS=COLUMNS, SLICE=SLICE,
        DEPTH=depth, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _depth(dim):
    return max(16, min(triton.next_power_of_2(dim), MOST_DEPTH))


def _parts(num_rows, num_columns):
    """How many parts the columns are in, and columns a part."""
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(num_rows, ROWS))
    blocks = triton.cdiv(num_columns, COLUMNS)
    blocks_each = triton.cdiv(blocks, min(wanted, blocks))
    return triton.cdiv(blocks, blocks_each), blocks_each * COLUMNS


@triton.jit
def _load(ptr, places, depth, count, D: tl.constexpr):
    mask = (places < count)[:, None] & (depth < D)[None, :]
    return tl.load(ptr + places.to(tl.int64)[:, None] * D + depth[None, :], mask=mask, other=0.0)


@triton.jit
def _similarities(
    rows_ptr, columns_ptr, rows, columns, num_rows, num_columns,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    dots = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, SLICE):
        depth = start + tl.arange(0, SLICE)
        x = _load(rows_ptr, rows, depth, num_rows, D)
        y = _load(columns_ptr, columns, depth, num_columns, D)
        dots = tl.dot(x, tl.trans(y), dots, input_precision=PRECISION)
    return dots


@triton.jit
def _forward_kernel(
    queries, keys, temperature, out, own, num_rows, num_columns, part_size,
    D: tl.constexpr, HAS_OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """ROWS queries against one part of the keys; exponents are of two."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    scale = LOG2_E / tl.load(temperature)
    if HAS_OWN:
        own_key = tl.load(own + rows, mask=rows < num_rows, other=-1)
    # No similarity of unit rows is below -1 by more than rounding, so a finite maximum to begin with changes nothing.
    peak = tl.zeros([ROWS], tl.float32) - scale
    total = tl.zeros([ROWS], tl.float32)
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        dots = _similarities(queries, keys, rows, columns, num_rows, num_columns, D, ROWS, COLUMNS, SLICE)
        counted = (columns < num_columns)[None, :]
        if HAS_OWN:
            counted = counted & (own_key[:, None] != columns[None, :])
        exponents = tl.where(counted, dots * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(exponents, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(exponents - higher[:, None]), 1)
        peak = higher
    tl.store(out + part * num_rows + rows, (peak + tl.log2(total)) / LOG2_E, mask=rows < num_rows)


@triton.jit
def _backward_kernel(
    rows_ptr, columns_ptr, temperature, grad, lse, out, own, num_rows, num_columns, part_size,
    D: tl.constexpr, HAS_OWN: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """DEPTH elements of the gradients of ROWS rows, as far as one part of the columns gives them.

    A softmax is recomputed from the log-sum-exp of its anchors, which are the rows, the columns, or both.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    depth = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    inverse = 1.0 / tl.load(temperature)
    if BY_ROW:
        row_grad = tl.load(grad + rows, mask=rows < num_rows, other=0.0)
        row_lse = tl.load(lse + rows, mask=rows < num_rows, other=float("inf"))
        if HAS_OWN:
            own_column = tl.load(own + rows, mask=rows < num_rows, other=-1)
    gradient = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, num_columns), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < num_columns
        logits = inverse * _similarities(
            rows_ptr, columns_ptr, rows, columns, num_rows, num_columns, D, ROWS, COLUMNS, SLICE
        )
        weights = tl.zeros([ROWS, COLUMNS], tl.float32)
        if BY_ROW:
            weights += row_grad[:, None] * tl.exp2((logits - row_lse[:, None]) * LOG2_E)
        if BY_COLUMN:
            column_grad = tl.load(grad + columns, mask=inside, other=0.0)
            column_lse = tl.load(lse + columns, mask=inside, other=float("inf"))
            weights += column_grad[None, :] * tl.exp2((logits - column_lse[None, :]) * LOG2_E)
        counted = inside[None, :]
        if HAS_OWN:
            if BY_ROW:
                counted = counted & (own_column[:, None] != columns[None, :])
            else:
                own_row = tl.load(own + columns, mask=inside, other=-1)
                counted = counted & (own_row[None, :] != rows[:, None])
        y = _load(columns_ptr, columns, depth, num_columns, D)
        gradient = tl.dot(tl.where(counted, weights, 0.0), y, gradient, input_precision=PRECISION)
    mask = (rows < num_rows)[:, None] & (depth < D)[None, :]
    places = (part.to(tl.int64) * num_rows + rows)[:, None] * D + depth[None, :]
    tl.store(out + places, gradient * inverse, mask=mask)
