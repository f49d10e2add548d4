"""Max pooling whose backward pass gathers: each place of the input adds up the gradients of the windows it has won.

Inductor's (torch 2.14) fills with zeros and adds with fp32 atomics: 8.6 times the bytes of this one in a ResNet's stem.
Images are channels-last, [B, H, W, C] in memory.
"""

import torch
import triton
import triton.language as tl

from fastsiam.kernels.batch_norm import takes
from fastsiam.kernels.reference import max_pool_ref

TILE = 2048
NUM_WARPS = 8
MOST_COLUMNS = 64


def max_pool(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """F.max_pool2d of `x` [B, C, H, W] over square windows, gradient included.

    Channels-last images on CUDA take the kernel, others F.max_pool2d. Of equal values the first has the gradient.
    """
    if not takes(x):
        return max_pool_ref(x, kernel_size, stride, padding)
    return max_pool_op(x, kernel_size, stride, padding)[0]


@torch.library.custom_op("fastsiam::max_pool", mutates_args=())
def max_pool_op(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima [B, C, OH, OW] and, as uint8, which place of its window each of them is, row by row."""
    y, winners = _outputs(x, kernel_size, stride, padding)
    grid, shape = _launch(y, x)
    _forward_kernel[grid](x, y, winners, KERNEL=kernel_size, STRIDE=stride, PADDING=padding, **shape)
    return y, winners


@max_pool_op.register_fake
def _(x, kernel_size, stride, padding):
    return _outputs(x, kernel_size, stride, padding)


@torch.library.custom_op("fastsiam::max_pool_backward", mutates_args=())
def max_pool_backward_op(
    grad: torch.Tensor, winners: torch.Tensor, height: int, width: int, kernel_size: int, stride: int, padding: int
) -> torch.Tensor:
    """The gradient [B, C, H, W] of the input, of that of the output."""
    dx = _images(grad, height, width, grad.dtype)
    grid, shape = _launch(dx, grad)
    _backward_kernel[grid](grad, winners, dx, KERNEL=kernel_size, STRIDE=stride, PADDING=padding, **shape)
    return dx


@max_pool_backward_op.register_fake
def _(grad, winners, height, width, kernel_size, stride, padding):
    return _images(grad, height, width, grad.dtype)


def _setup_context(ctx, inputs, output):
    x, *ctx.window = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    (winners,) = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    return max_pool_backward_op(grad, winners, *ctx.size, *ctx.window), None, None, None


max_pool_op.register_autograd(_backward, setup_context=_setup_context)


def _outputs(x, kernel_size, stride, padding):
    height, width = ((side + 2 * padding - kernel_size) // stride + 1 for side in x.shape[2:])
    return _images(x, height, width, x.dtype), _images(x, height, width, torch.uint8)


def _images(like, height, width, dtype):
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _launch(written, read):
    """The grid over `written`, and the kernel's numbers; HEIGHT and WIDTH are those of what is written."""
    batch, channels, height, width = written.shape
    columns = min(triton.next_power_of_2(channels), MOST_COLUMNS)
    rows = TILE // columns
    grid = (triton.cdiv(batch * height * width, rows) * triton.cdiv(channels, columns),)
    sides = {"num_rows": batch * height * width, "height": read.shape[2], "width": read.shape[3]}
    shape = {"HEIGHT": height, "WIDTH": width, "C": channels, "COLUMNS": columns, "ROWS": rows}
    return grid, {**sides, **shape, "num_warps": NUM_WARPS}


@triton.jit
def _places(
    num_rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """The written places of this program: offsets, image, row and column [ROWS], channels [COLUMNS]; which exist."""
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    cols = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    place = (tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = (place < num_rows)[:, None] & (cols < C)[None, :]
    offsets = place[:, None] * C + cols[None, :]
    return offsets, place // (HEIGHT * WIDTH), place // WIDTH % HEIGHT, place % WIDTH, cols, exists


@triton.jit
def _forward_kernel(
    x, y, winners, num_rows, height, width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offsets, image, row, column, cols, exists = _places(num_rows, HEIGHT, WIDTH, C, COLUMNS, ROWS)
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full([ROWS, COLUMNS], float("-inf"), ACC)
    winner = tl.full([ROWS, COLUMNS], 255, tl.uint8)
    for window_row in tl.static_range(KERNEL):
        for window_column in tl.static_range(KERNEL):
            h, w = row * STRIDE - PADDING + window_row, column * STRIDE - PADDING + window_column
            inside = exists & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            places = ((image * height + h) * width + w)[:, None] * C + cols[None, :]
            value = tl.load(x + places, mask=inside, other=float("-inf")).to(ACC)
            # As torch: NaN wins, and in a window of -inf the first place.
            better = inside & ((value > best) | (value != value) | (winner == 255))
            best = tl.where(better, value, best)
            winner = tl.where(better, window_row * KERNEL + window_column, winner).to(tl.uint8)
    tl.store(y + offsets, best.to(y.dtype.element_ty), mask=exists)
    tl.store(winners + offsets, winner, mask=exists)


@triton.jit
def _backward_kernel(
    grad, winners, dx, num_rows, height, width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    offsets, image, row, column, cols, exists = _places(num_rows, HEIGHT, WIDTH, C, COLUMNS, ROWS)
    ACC: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], ACC)
    # Windows over a place begin at the last one that its own row lies in, and go back.
    for back_row in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for back_column in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            h, w = (row + PADDING) // STRIDE - back_row, (column + PADDING) // STRIDE - back_column
            in_row, in_column = row + PADDING - h * STRIDE, column + PADDING - w * STRIDE
            covers = (h >= 0) & (h < height) & (in_row < KERNEL) & (w >= 0) & (w < width) & (in_column < KERNEL)
            places = ((image * height + h) * width + w)[:, None] * C + cols[None, :]
            inside = exists & covers[:, None]
            winner = tl.load(winners + places, mask=inside, other=255)
            of_window = tl.load(grad + places, mask=inside, other=0.0).to(ACC)
            total += tl.where(winner == (in_row * KERNEL + in_column)[:, None], of_window, 0.0)
    tl.store(dx + offsets, total.to(dx.dtype.element_ty), mask=exists)
