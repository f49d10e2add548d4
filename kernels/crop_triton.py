"""Crop and resize on CUDA in one launch: a program makes a tile of one crop.

The tiles are flat rows of RGB elements. An output sums what lies under its triangle, rows in the outer loop, columns in
the inner one: 2 x 2 pixels where the box is enlarged, as of a store near the size of the views. A pass each way would
need scratch, and would pay only where boxes shrink much.

Images of one size lie in one tensor. Decoded ones of different sizes stay where the decoder put them: a table gives the
kernel each crop's image, so that nothing is copied before it is cropped.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from fastsiam.kernels import reference
from fastsiam.kernels.crop_numba import check_boxes
from fastsiam.kernels.transfer import send

EDGE = tl.constexpr(reference.CROP_EDGE)
# Elements of a tile, 8 a thread, and the most of them in a row.
TILE, BLOCK, NUM_WARPS = 1024, 256, 4


def crop_on_cuda(images, boxes, size, indices):
    """Runs the op for CUDA tensors, `boxes` fp32; see `crop_resize`."""
    indexed = indices is not None
    indices = indices.contiguous() if indexed else boxes
    return _crop(images, boxes, size, indices, images.shape[1:3], INDEXED=indexed, SCATTERED=False)


def crop_scattered(
    addresses: np.ndarray, sizes: np.ndarray, boxes: np.ndarray, size: int, device: torch.device
) -> torch.Tensor:
    """Makes V crops of each of N images that lie apart in the memory of `device`: uint8 [V*N, S, S, 3] there.

    The arguments are those of `fastsiam.kernels.crop_numba.crop_on_cpu`, and so are the crops. The memory must stay
    as it is until the current stream has passed the launch.
    """
    check_boxes(boxes, sizes)
    num_views, num_images = boxes.shape[:2]
    table = np.empty((num_views, num_images, 3), np.int64)
    table[:, :, 0], table[:, :, 1:] = addresses, sizes
    like = torch.empty(0, dtype=torch.uint8, device=device)
    table = send(torch.from_numpy(table.reshape(-1, 3)), like)
    boxes = send(torch.from_numpy(boxes.reshape(-1, 4).astype(np.float32)), like)
    return _crop(table, boxes, size, boxes, (0, 0), INDEXED=False, SCATTERED=True)


def _crop(images, boxes, size, indices, shape, **constants):
    out = torch.empty(len(boxes), size, size, 3, dtype=torch.uint8, device=boxes.device)
    if not len(boxes):
        return out
    block = min(BLOCK, triton.next_power_of_2(3 * size))
    rows = min(TILE // block, triton.next_power_of_2(size))
    grid = (len(boxes), triton.cdiv(size, rows), triton.cdiv(3 * size, block))
    _crop_kernel[grid](
        images, boxes.contiguous(), indices, out, *shape, size, **constants, ROWS=rows, BLOCK=block,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _crop_kernel(
    images, boxes, indices, out, height, width, size,
    INDEXED: tl.constexpr, SCATTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`images`: uint8 [N, H, W, 3]; SCATTERED: int64 [crops, 3], each crop's address of pixels, height and width."""
    crop = tl.program_id(0).to(tl.int64)
    if SCATTERED:
        pixels = tl.load(images + 3 * crop).to(tl.pointer_type(tl.uint8))
        height = tl.load(images + 3 * crop + 1).to(tl.int32)
        width = tl.load(images + 3 * crop + 2).to(tl.int32)
    else:
        image = crop
        if INDEXED:
            image = tl.load(indices + crop)
        pixels = images + image * height * width * 3
    boxes += 4 * crop
    top, row_pixels, row_begin, row_scale = _span(tl.load(boxes), tl.load(boxes + 2), height, size)
    left, column_pixels, column_begin, column_scale = _span(tl.load(boxes + 1), tl.load(boxes + 3), width, size)
    pixels += (top * width + left) * 3

    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first_row, row_center, row_slope, row_taps = _taps(rows, row_begin, row_scale, row_pixels, size)
    first, center, slope, taps = _taps(element // 3, column_begin, column_scale, column_pixels, size)

    row_sum, column_sum = tl.zeros([ROWS], tl.float32), tl.zeros([BLOCK], tl.float32)
    for tap in range(taps):
        column_sum += _weight(first + tap, column_pixels, center, slope)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row_tap in range(row_taps):
        row = first_row + row_tap
        row_weight = _weight(row, row_pixels, row_center, row_slope)
        row_sum += row_weight
        line = tl.zeros([ROWS, BLOCK], tl.float32)
        for tap in range(taps):
            column = first + tap
            place = row[:, None] * (3 * width) + (3 * column + element % 3)[None, :]
            mask = (row < row_pixels)[:, None] & (column < column_pixels)[None, :]
            value = tl.load(pixels + place, mask=mask, other=0).to(tl.float32)
            line += _weight(column, column_pixels, center, slope)[None, :] * value
        total += row_weight[:, None] * line
    value = total / (row_sum[:, None] * column_sum[None, :]) + 0.5
    places = out + crop * size * size * 3 + rows[:, None] * (3 * size) + element[None, :]
    tl.store(places, value.to(tl.int32).to(tl.uint8), mask=(rows < size)[:, None] & (element < 3 * size)[None, :])


@triton.jit
def _span(begin, length, limit, size):
    """Returns the first pixel under the box, the number of them, the box's beginning in the first, and the scale."""
    low = tl.minimum(tl.maximum(tl.floor(begin + EDGE).to(tl.int32), 0), limit - 1)
    high = tl.minimum(tl.maximum(tl.ceil(begin + length - EDGE).to(tl.int32), low + 1), limit)
    return low, high - low, begin - low.to(tl.float32), length / size


@triton.jit
def _taps(output, begin, scale, pixels, size):
    """Returns each output place's first pixel, the triangle's centre and slope, and the most pixels that it covers."""
    reach = tl.maximum(scale, 1.0)
    # Places past the crop are not stored, but the sum of their weights is a divisor.
    center = begin + (tl.minimum(output, size - 1).to(tl.float32) + 0.5) * scale
    first = tl.minimum(tl.maximum(tl.floor(center - reach + 0.5).to(tl.int32), 0), pixels - 1)
    return first, center, 1.0 / reach, tl.ceil(2.0 * reach).to(tl.int32)


@triton.jit
def _weight(place, pixels, center, slope):
    weight = tl.maximum(1.0 - tl.abs(place.to(tl.float32) + 0.5 - center) * slope, 0.0)
    return tl.where(place < pixels, weight, 0.0)
