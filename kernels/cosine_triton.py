"""Triton kernels of the negative cosine loss: one launch forward, one backward, in place of about fifty in eager torch.

Each direction reads a row once: the forward keeps two norms and the cosine of a row, from which the backward recomputes
everything else. The forward's programs count how many of them are done, and the last one adds up. The counter begins at
zero: filling it takes one more launch a call, and none where the caller keeps a counter, which ends at zero.
"""

import torch
import triton
import triton.language as tl

from fastsiam.kernels.reference import SMALLEST_NORM

EPS = tl.constexpr(SMALLEST_NORM)
# fp32 squares of rows with larger entries could overflow, so such rows are shrunk by a power of two first, which
# rounds nothing: 2^50 to 2^128 becomes 2^-26 (still above EPS) to 2^52.
HUGE = tl.constexpr(2.0**50)
SHRINK = tl.constexpr(2.0**-76)
# Elements of p and of z that a program holds: 16 of each a thread with 8 warps.
TILE = 4096
NUM_WARPS = 8
PARTIALS_BLOCK = 1024


def fused(p, z, stop_gradient=True, counter=None):
    """Minus the mean cosine over one or two pairs: p[i] [N, d] against the mean over K of z[i] [K, N, d]."""
    if stop_gradient:
        z = [target.detach() for target in z]
    return negative_cosine_op(p, z, counter)[0]


@torch.library.custom_op("fastsiam::negative_cosine", mutates_args=())
def negative_cosine_op(
    p: list[torch.Tensor], z: list[torch.Tensor], counter: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and what its gradient needs: [len(p), 3, N], the norms of p and of the target, and their cosine.

    `counter` ends as it began, so this op does not mutate it.
    """
    num_rows, dim = p[0].shape
    acc = _accumulator(p, z)
    block, rows = _tiling(dim)
    row_blocks = triton.cdiv(num_rows, rows)
    statistics = p[0].new_empty((len(p), 3, num_rows), dtype=acc)
    partial = p[0].new_empty(len(p) * row_blocks, dtype=acc)
    # Not kept here from call to call: CUDA graphs' pools of memory refuse what outlives them unannounced.
    counter = p[0].new_zeros(1, dtype=torch.int32) if counter is None else counter
    loss = p[0].new_empty((), dtype=acc)
    _forward_kernel[(row_blocks, len(p))](
        *_operands(p, z), statistics, partial, counter, loss, num_rows, *_strides(p, z),
        D=dim, TARGETS=z[0].shape[0], ROWS=rows, BLOCK=block, PARTIALS_BLOCK=PARTIALS_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return loss, statistics


@negative_cosine_op.register_fake
def _(p, z, counter=None):
    acc = _accumulator(p, z)
    return p[0].new_empty((), dtype=acc), p[0].new_empty((len(p), 3, p[0].shape[0]), dtype=acc)


@torch.library.custom_op("fastsiam::negative_cosine_backward", mutates_args=())
def negative_cosine_backward_op(
    grad: torch.Tensor, p: list[torch.Tensor], z: list[torch.Tensor], statistics: torch.Tensor, to_z: bool
) -> list[torch.Tensor]:
    """The gradients of p, then, where `to_z`, those of each of the K targets (the same for all): all [N, d]."""
    num_rows, dim = p[0].shape
    block, rows = _tiling(dim)
    p_grads, z_grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in p], []
    if to_z:
        z_grads = [x.new_empty((num_rows, dim)) for x in z]
    # Without `to_z` the kernel is given p's gradients in z's place and writes nothing there.
    places = p_grads[0], p_grads[-1], *((z_grads[0], z_grads[-1]) if to_z else (p_grads[0], p_grads[-1]))
    _backward_kernel[(triton.cdiv(num_rows, rows), len(p))](
        *_operands(p, z), grad, statistics, *places, num_rows, *_strides(p, z),
        D=dim, TARGETS=z[0].shape[0], TO_Z=to_z, ROWS=rows, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return p_grads + z_grads


@negative_cosine_backward_op.register_fake
def _(grad, p, z, statistics, to_z):
    p_grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in p]
    return p_grads + ([x.new_empty(x.shape[1:]) for x in z] if to_z else [])


def _setup_context(ctx, inputs, output):
    p, z, _ = inputs
    ctx.num_pairs = len(p)
    ctx.save_for_backward(*p, *z, output[1])


def _backward(ctx, grad, _):
    *tensors, statistics = ctx.saved_tensors
    p, z = tensors[: ctx.num_pairs], tensors[ctx.num_pairs :]
    to_z = any(ctx.needs_input_grad[1])
    grads = negative_cosine_backward_op(grad, p, z, statistics, to_z)
    z_grads = [grad.expand_as(x) for grad, x in zip(grads[len(p) :], z, strict=True)] if to_z else [None] * len(z)
    return grads[: len(p)], z_grads, None


negative_cosine_op.register_autograd(_backward, setup_context=_setup_context)


def _accumulator(p, z):
    return torch.promote_types(torch.promote_types(p[0].dtype, z[0].dtype), torch.float32)


def _tiling(dim):
    block = min(triton.next_power_of_2(dim), TILE)
    return block, TILE // block if block > 128 else 32


def _operands(p, z):
    """The two pairs' tensors; a single pair stands in both places, and the grid reaches the first only."""
    return p[0], p[-1], z[0], z[-1]


def _strides(p, z):
    return *p[0].stride(), *p[-1].stride(), *z[0].stride(), *z[-1].stride()


@triton.jit
def _load_p(ptr, rows, cols, row_stride, col_stride, num_rows, D: tl.constexpr):
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * row_stride + cols[None, :] * col_stride, mask=mask, other=0.0)


@triton.jit
def _load_target(
    ptr, rows, cols, target_stride, row_stride, col_stride, num_rows,
    D: tl.constexpr, TARGETS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The mean of the K targets."""
    z = _load_p(ptr, rows, cols, row_stride, col_stride, num_rows, D).to(ACC)
    for target in tl.static_range(1, TARGETS):
        z += _load_p(ptr + target * target_stride, rows, cols, row_stride, col_stride, num_rows, D).to(ACC)
    return z if TARGETS == 1 else z * (1.0 / TARGETS)


@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _forward_rows(
    p, z, statistics, rows, num_rows, p_row, p_col, z_target, z_row, z_col,
    D: tl.constexpr, TARGETS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the statistics of some rows of one pair; returns the sum of their cosines."""
    # A row of at most BLOCK elements is loaded once: the loops have one round, and the second load is the first's.
    p_peak, z_peak = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_p(p, rows, cols, p_row, p_col, num_rows, D).to(ACC)
        y = _load_target(z, rows, cols, z_target, z_row, z_col, num_rows, D, TARGETS, ACC)
        p_peak = tl.maximum(p_peak, tl.max(tl.abs(x), 1))
        z_peak = tl.maximum(z_peak, tl.max(tl.abs(y), 1))
    p_scale = tl.where(p_peak > HUGE, SHRINK, 1.0).to(ACC)
    z_scale = tl.where(z_peak > HUGE, SHRINK, 1.0).to(ACC)

    pp, zz, pz = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_p(p, rows, cols, p_row, p_col, num_rows, D).to(ACC) * p_scale[:, None]
        y = _load_target(z, rows, cols, z_target, z_row, z_col, num_rows, D, TARGETS, ACC) * z_scale[:, None]
        pp += tl.sum(x * x, 1)
        zz += tl.sum(y * y, 1)
        pz += tl.sum(x * y, 1)

    p_norm, z_norm = _sqrt(pp), _sqrt(zz)
    cosine = _divide(_divide(pz, tl.maximum(p_norm, EPS)), tl.maximum(z_norm, EPS))
    tl.store(statistics + rows, p_norm / p_scale, mask=rows < num_rows)
    tl.store(statistics + num_rows + rows, z_norm / z_scale, mask=rows < num_rows)
    tl.store(statistics + 2 * num_rows + rows, cosine, mask=rows < num_rows)
    return tl.sum(cosine, 0)


@triton.jit
def _forward_kernel(
    p_a, p_b, z_a, z_b, statistics, partial, counter, loss, num_rows,
    p_a_row, p_a_col, p_b_row, p_b_col, z_a_target, z_a_row, z_a_col, z_b_target, z_b_row, z_b_col,
    D: tl.constexpr, TARGETS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTIALS_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one pair a program; the program that finishes last adds the sums up, always in the same order."""
    ACC: tl.constexpr = statistics.dtype.element_ty
    pair = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Two calls, not two chosen pointers: a choice loses what the compiler knows of alignment.
    if pair == 0:
        cosines = _forward_rows(
            p_a, z_a, statistics, rows, num_rows, p_a_row, p_a_col, z_a_target, z_a_row, z_a_col,
            D, TARGETS, ROWS, BLOCK, ACC,
        )  # fmt: skip
    else:
        cosines = _forward_rows(
            p_b, z_b, statistics + 3 * num_rows, rows, num_rows, p_b_row, p_b_col, z_b_target, z_b_row, z_b_col,
            D, TARGETS, ROWS, BLOCK, ACC,
        )  # fmt: skip

    num_partials = tl.num_programs(0) * tl.num_programs(1)
    tl.store(partial + pair * tl.num_programs(0) + tl.program_id(0), cosines)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == num_partials - 1:
        total = tl.zeros([PARTIALS_BLOCK], ACC)
        for start in range(0, num_partials, PARTIALS_BLOCK):
            places = start + tl.arange(0, PARTIALS_BLOCK)
            # .cg reads from L2: the other programs' sums are not in this processor's L1.
            total += tl.load(partial + places, mask=places < num_partials, other=0.0, cache_modifier=".cg")
        tl.store(loss, -tl.sum(total, 0) / (num_rows * tl.num_programs(1)))
        tl.store(counter, 0)


@triton.jit
def _backward_rows(
    p, z, statistics, p_grad, z_grad, weight, rows, num_rows, p_row, p_col, z_target, z_row, z_col,
    D: tl.constexpr, TARGETS: tl.constexpr, TO_Z: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d cos / dp = (z / |z| - cos p / |p|) / |p|, and the same with p and z exchanged."""
    p_norm = tl.load(statistics + rows, mask=rows < num_rows, other=1.0)
    z_norm = tl.load(statistics + num_rows + rows, mask=rows < num_rows, other=1.0)
    cosine = tl.load(statistics + 2 * num_rows + rows, mask=rows < num_rows, other=0.0)
    # torch divides by the clamped norm, and lets the norm's own gradient pass unclamped: zero for a row of zeros.
    p_inverse, z_inverse = 1.0 / tl.maximum(p_norm, EPS), 1.0 / tl.maximum(z_norm, EPS)
    p_direction = tl.where(p_norm == 0.0, 0.0, cosine / p_norm)
    z_direction = tl.where(z_norm == 0.0, 0.0, cosine / z_norm)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_p(p, rows, cols, p_row, p_col, num_rows, D).to(ACC)
        y = _load_target(z, rows, cols, z_target, z_row, z_col, num_rows, D, TARGETS, ACC)
        mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
        places = rows[:, None] * D + cols[None, :]
        to_p = (weight * p_inverse)[:, None] * (y * z_inverse[:, None] - x * p_direction[:, None])
        tl.store(p_grad + places, to_p.to(p_grad.dtype.element_ty), mask=mask)
        if TO_Z:
            to_z = (weight * z_inverse / TARGETS)[:, None] * (x * p_inverse[:, None] - y * z_direction[:, None])
            tl.store(z_grad + places, to_z.to(z_grad.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    p_a, p_b, z_a, z_b, grad, statistics, p_a_grad, p_b_grad, z_a_grad, z_b_grad, num_rows,
    p_a_row, p_a_col, p_b_row, p_b_col, z_a_target, z_a_row, z_a_col, z_b_target, z_b_row, z_b_col,
    D: tl.constexpr, TARGETS: tl.constexpr, TO_Z: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = statistics.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Scaled in fp32 before it is stored: in fp16 a gradient of 1 / (2 N |p|) would be subnormal at N = 4096.
    weight = -tl.load(grad).to(ACC) / (num_rows * tl.num_programs(1))
    if tl.program_id(1) == 0:
        _backward_rows(
            p_a, z_a, statistics, p_a_grad, z_a_grad, weight, rows, num_rows,
            p_a_row, p_a_col, z_a_target, z_a_row, z_a_col, D, TARGETS, TO_Z, BLOCK, ACC,
        )  # fmt: skip
    else:
        _backward_rows(
            p_b, z_b, statistics + 3 * num_rows, p_b_grad, z_b_grad, weight, rows, num_rows,
            p_b_row, p_b_col, z_b_target, z_b_row, z_b_col, D, TARGETS, TO_Z, BLOCK, ACC,
        )  # fmt: skip
