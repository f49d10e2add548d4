"""Crop and resize on the CPU, compiled by numba: crops in parallel, each a vertical and then a horizontal pass.

The vertical pass comes first, over whole rows at unit stride, which LLVM vectorises; the horizontal one, which it does
not, then has the output's rows only. 0.3 ms a crop of an ImageNet photograph to 224 px on one core, where Pillow takes
1.0 and DALI's CPU resize 1.1.
"""

import numba
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastsiam.kernels.numba_cache import KEEPS_CODE
from fastsiam.kernels.reference import CROP_EDGE
from fastsiam.kernels.threads import as_torch_has

JIT = {"fastmath": True, "cache": KEEPS_CODE}


def crop_on_cpu(addresses: np.ndarray, sizes: np.ndarray, boxes: np.ndarray, size: int) -> torch.Tensor:
    """V crops of each of N decoded images, resized with Pillow's antialiased bilinear filter: uint8 [V*N, S, S, 3].

    `addresses`: int64 [N], where each image's contiguous uint8 [H, W, 3] lies in memory that stays valid meanwhile;
    `sizes`: [N, 2] heights and widths; `boxes`: [V, N, 4] top, left, height, width in pixels, fractions allowed.
    Crop v of image n is row v * N + n. At most 1 off Pillow, which rounds to uint8 between its two passes. Raises
    `ValueError` for a box that reaches outside its image.
    """
    sizes, boxes = np.ascontiguousarray(sizes, np.int64), np.ascontiguousarray(boxes, np.float64)
    check_boxes(boxes, sizes)
    num_views, num_images = boxes.shape[:2]
    out = torch.empty(num_views * num_images, size, 3 * size, dtype=torch.uint8)
    with as_torch_has():
        _crop_all(addresses, sizes, boxes.reshape(-1, 4), out.numpy())
    return out.view(-1, size, size, 3)


def check_boxes(boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Raise `ValueError` for boxes [..., 4] that are empty or reach outside images of `sizes` [..., 2]."""
    begin, length = boxes[..., :2], boxes[..., 2:]
    inside = (begin >= -CROP_EDGE) & (length > 0) & (begin + length <= sizes + CROP_EDGE)
    if not inside.all():
        raise ValueError("a box is empty or reaches outside its image")


@numba.njit(parallel=True, **JIT)
def _crop_all(addresses, sizes, boxes, out):
    """`boxes` [V*N, 4], `out` [V*N, S, 3S]."""
    for crop in numba.prange(len(boxes)):
        image = crop % len(addresses)
        shape = (sizes[image, 0], 3 * sizes[image, 1])
        crop_into(numba.carray(_pointer(addresses[image]), shape, dtype=np.uint8), boxes[crop], out[crop])


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@numba.njit(**JIT)
def crop_into(image, box, out):
    """One crop, called from compiled code: `image` uint8 [H, 3W], `box` [4] inside it, `out` uint8 [S, 3S]."""
    size, width = out.shape[0], image.shape[1] // 3
    row_start, row_taps, row_weights = _filter(box[0], box[2], image.shape[0], size)
    start, taps, weights = _filter(box[1], box[3], width, size)
    left, right = 3 * start[0], 3 * (start[size - 1] + taps[size - 1])
    line = np.empty(right - left, np.float32)
    for y in range(size):
        first, weight = row_start[y], row_weights[y, 0]
        source = image[first, left:right]
        for i in range(len(line)):
            line[i] = weight * source[i]
        for tap in range(1, row_taps[y]):
            source, weight = image[first + tap, left:right], row_weights[y, tap]
            for i in range(len(line)):
                line[i] += weight * source[i]
        for x in range(size):
            red, green, blue = np.float32(0.5), np.float32(0.5), np.float32(0.5)
            place = 3 * start[x] - left
            for tap in range(taps[x]):
                weight = weights[x, tap]
                red += weight * line[place]
                green += weight * line[place + 1]
                blue += weight * line[place + 2]
                place += 3
            out[y, 3 * x], out[y, 3 * x + 1], out[y, 3 * x + 2] = np.uint8(red), np.uint8(green), np.uint8(blue)


@numba.njit(**JIT)
def _filter(begin, length, limit, size):
    """Pillow's bilinear filter, widened where it shrinks: first pixel, number of pixels and weights of each output.

    Pixels outside the box have no part, as where the crop is cut out before it is resized.
    """
    scale = length / size
    reach = max(scale, 1.0)
    low = min(int(np.floor(begin + CROP_EDGE)), limit - 1)
    high = min(max(int(np.ceil(begin + length - CROP_EDGE)), low + 1), limit)
    start, taps = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, 2 * int(np.ceil(reach)) + 1), np.float32)
    for x in range(size):
        center = begin + (x + 0.5) * scale
        first = min(max(int(center - reach + 0.5), low), high - 1)
        last = max(min(int(center + reach + 0.5), high), first + 1)
        total = 0.0
        for i in range(first, last):
            weight = max(1.0 - abs((i - center + 0.5) / reach), 0.0)
            weights[x, i - first] = weight
            total += weight
        for i in range(last - first):
            weights[x, i] /= total
        start[x], taps[x] = first, last - first
    return start, taps, weights
