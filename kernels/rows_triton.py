"""What Triton kernels of channels-last images share: [V*N, H, W, C], rows of C values."""

import triton
import triton.language as tl


@triton.jit
def inside(rows, cols, num_rows, C: tl.constexpr):
    return (rows < num_rows)[:, None] & (cols < C)[None, :]


@triton.jit
def load_rows(ptr, rows, cols, num_rows, C: tl.constexpr):
    """0 outside."""
    return tl.load(ptr + rows[:, None] * C + cols[None, :], mask=inside(rows, cols, num_rows, C), other=0.0)


@triton.jit
def store_rows(ptr, value, rows, cols, num_rows, C: tl.constexpr):
    """In the dtype of what `ptr` points to."""
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + rows[:, None] * C + cols[None, :], value, mask=inside(rows, cols, num_rows, C))


@triton.jit
def tile_of_program(num_rows, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Number of the tile of rows, view, columns; the tile's first row among those of all views, and how many are left.

    The grid is (tiles, the blocks of columns of some rows side by side; views).
    """
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tile, view = tl.program_id(0) // BLOCKS, tl.program_id(1)
    cols = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    return tile, view, cols, view.to(tl.int64) * num_rows + tile * ROWS, num_rows - tile * ROWS
