"""The augmenter on the CPU, compiled by numba: views in parallel, a view row by row.

A row of RGB pixels is one flat array, on which a 3x3 colour matrix is a stencil of five taps whose weights repeat
every three elements: unit stride, so LLVM vectorises it. 0.06 ms a view of 224 px on two cores with AVX512, against
0.125 ms for a loop over pixels. Compiled code is kept on disk.
"""

import numba
import numpy as np
import torch
from numba.extending import overload

from fastsiam.kernels.augment_table import BLUR, COLOR, EDGE, FLIP, REACH, SOLARIZE
from fastsiam.kernels.numba_cache import KEEPS_CODE
from fastsiam.kernels.reference import LUMA
from fastsiam.kernels.threads import as_torch_has

# Blur weights below 2^-24 of the largest are lost in fp32: at sigma 0.1 one tap remains, at 1 six each side.
NEGLIGIBLE = 2.0**-24
R_WEIGHT, G_WEIGHT, B_WEIGHT = (np.float32(weight) for weight in LUMA)
JIT = {"fastmath": True, "cache": KEEPS_CODE}


def augment_on_cpu(crops, table, scale, bias, exact, dtype):
    """Runs the op for CPU tensors; see `augment_views`. torch rounds fp32 to fp16, which numba does not have here."""
    num_views, size = crops.shape[:2]
    out = torch.empty(num_views, size, 3 * size, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    kernel = _augment_exactly if exact else _augment_by_matrix
    with as_torch_has() as threads:
        kernel(
            crops.contiguous().view(num_views, size, 3 * size).numpy(),
            table.contiguous().numpy(),
            np.asarray(scale, np.float32),
            np.asarray(bias, np.float32),
            np.empty((threads, size, 3 * size), np.float32),
            out.view(torch.uint16).numpy() if dtype == torch.bfloat16 else out.numpy(),
        )
    return out.view(num_views, size, size, 3).to(dtype).permute(0, 3, 1, 2)


# Two functions, so that a run compiles only the colour mode that it uses.
@numba.njit(parallel=True, **JIT)
def _augment_by_matrix(crops, table, scale, bias, state_of_thread, out):
    """`crops` uint8 [B, S, 3S], `out` fp32 or the bits of bf16, [B, S, 3S]."""
    for view in numba.prange(len(crops)):
        _matrix_view(crops[view], table[view], scale, bias, state_of_thread[numba.get_thread_id()], out[view])


@numba.njit(parallel=True, **JIT)
def _augment_exactly(crops, table, scale, bias, state_of_thread, out):
    for view in numba.prange(len(crops)):
        _exact_view(crops[view], table[view], scale, bias, state_of_thread[numba.get_thread_id()], out[view])


@numba.njit(**JIT)
def _matrix_view(crop, draws, scale, bias, state, out):
    color = draws[COLOR:]
    blurred = draws[BLUR] > 0
    if blurred:
        _blur(crop, draws[BLUR:COLOR], int(draws[EDGE]), state)
    contrast = (color[9] * color[12], color[10] * color[12], color[11] * color[12])
    shift = np.float32(0)
    if contrast != (0, 0, 0):
        mean = _mean(state) if blurred else _mean(crop)
        shift = (color[9] * mean[0] + color[10] * mean[1] + color[11] * mean[2]) / np.float32(255)
    linear, offset = np.empty((3, 3), np.float32), np.empty(3, np.float32)
    for to in range(3):
        offset[to] = color[12 + to] * shift
        for source in range(3):
            linear[to, source] = color[3 * to + source] / np.float32(255)
    taps = _taps(linear, offset, draws[FLIP] > 0, out.shape[1])
    tail = _tail(scale, bias, out.shape[1])
    row, padded = np.empty(out.shape[1], np.float32), np.zeros(out.shape[1] + 4, np.float32)
    for y in range(len(out)):
        if blurred:
            _load(state[y], draws[FLIP] > 0, padded)
        else:
            _load(crop[y], draws[FLIP] > 0, padded)
        _color(padded, taps, row)
        _finish(row, draws[SOLARIZE] > 0, tail, out[y])


@numba.njit(**JIT)
def _exact_view(crop, draws, scale, bias, state, out):
    """torchvision's operations with a clamp after each: up to contrast, which needs the view's grey mean, then on."""
    size, width = out.shape
    mirrored, blurred = draws[FLIP] > 0, draws[BLUR] > 0
    order, factors, grayscale = draws[COLOR : COLOR + 4], draws[COLOR + 4 : COLOR + 8], draws[COLOR + 8] > 0
    if blurred:
        _blur(crop, draws[BLUR:COLOR], int(draws[EDGE]), state)
    eye, to_grey, nothing = np.eye(3, dtype=np.float32), np.empty((3, 3), np.float32), np.zeros(3, np.float32)
    to_grey[:, 0], to_grey[:, 1], to_grey[:, 2] = R_WEIGHT, G_WEIGHT, B_WEIGHT
    saturation = factors[2] * eye + (np.float32(1) - factors[2]) * to_grey
    to_unit = _taps(eye / np.float32(255), nothing, mirrored, width)
    saturate, grey = _taps(saturation, nothing, False, width), _taps(to_grey, nothing, False, width)
    contrast_at = 0
    while order[contrast_at] != 1:
        contrast_at += 1
    rows = np.empty((4, width + 4), np.float32)
    padded, planes = rows[0], rows[1:, : width // 3]
    padded[:2], padded[width + 2 :] = 0, 0
    for y in range(size):
        if blurred:
            _load(state[y], mirrored, padded)
        else:
            _load(crop[y], mirrored, padded)
        _color(padded, to_unit, state[y])
        for step in range(contrast_at):
            _jitter(state[y], int(order[step]), factors, saturate, padded, planes)
    factor, shift = factors[1], np.float32(0)
    if factor != 1:
        mean = _mean(state)
        shift = (np.float32(1) - factor) * (R_WEIGHT * mean[0] + G_WEIGHT * mean[1] + B_WEIGHT * mean[2])
    tail = _tail(scale, bias, width)
    for y in range(size):
        if factor != 1:
            _scale(state[y], factor, shift)
        for step in range(contrast_at + 1, 4):
            _jitter(state[y], int(order[step]), factors, saturate, padded, planes)
        if grayscale:
            _load(state[y], False, padded)
            _color(padded, grey, state[y])
        _finish(state[y], draws[SOLARIZE] > 0, tail, out[y])


@numba.njit(**JIT)
def _jitter(row, operation, factors, saturate, padded, planes):
    """Brightness, saturation or hue on one row, in place; a factor that changes nothing is passed over."""
    if operation == 0 and factors[0] != 1:
        _scale(row, factors[0], np.float32(0))
    elif operation == 2 and factors[2] != 1:
        _load(row, False, padded)
        _color(padded, saturate, row)
    elif operation == 3 and factors[3] != 0:
        _turn_hue(row, factors[3], planes[0], planes[1], planes[2])


@numba.njit(**JIT)
def _scale(row, factor, shift):
    for i in range(len(row)):
        row[i] = min(max(factor * row[i] + shift, np.float32(0)), np.float32(1))


@numba.njit(**JIT)
def _taps(linear, offset, mirrored, width):
    """A 3x4 map of RGB as weights [6, width] of the elements i - 2 ... i + 2 of a row, and the constant.

    A mirrored row has its pixels' channels in the order BGR.
    """
    taps = np.zeros((6, width), np.float32)
    for channel in range(3):
        for source in range(3):
            place = 2 - source if mirrored else source
            taps[place - channel + 2, channel::3] = linear[channel, source]
        taps[5, channel::3] = offset[channel]
    return taps


@numba.njit(**JIT)
def _tail(scale, bias, width):
    tail = np.empty((2, width), np.float32)
    for channel in range(3):
        tail[0, channel::3], tail[1, channel::3] = scale[channel], bias[channel]
    return tail


@numba.njit(**JIT)
def _load(source, mirrored, padded):
    """A row as fp32 behind two zeros; mirrored element by element."""
    width = len(source)
    if mirrored:
        # In two loops: LLVM vectorises neither reversal nor conversion when they are one (0.08 against 0.12 ms a view).
        reverse, last = np.empty_like(source), np.uint64(width - 1)
        for i in range(width):
            reverse[i] = source[last - np.uint64(i)]
        for i in range(width):
            padded[2 + i] = reverse[i]
    else:
        for i in range(width):
            padded[2 + i] = source[i]


@numba.njit(**JIT)
def _color(padded, taps, row):
    zero, one = np.float32(0), np.float32(1)
    t0, t1, t2, t3, t4, constant = taps[0], taps[1], taps[2], taps[3], taps[4], taps[5]
    for i in range(len(row)):
        value = t0[i] * padded[i] + t1[i] * padded[i + 1] + t2[i] * padded[i + 2] + t3[i] * padded[i + 3]
        row[i] = min(max(value + t4[i] * padded[i + 4] + constant[i], zero), one)


@numba.njit(**JIT)
def _finish(row, solarize, tail, out):
    """Solarize, normalise, store."""
    scale, bias = tail[0], tail[1]
    if solarize:
        for i in range(len(row)):
            row[i] = np.float32(1) - row[i] if row[i] >= np.float32(0.5) else row[i]
    for i in range(len(row)):
        row[i] = row[i] * scale[i] + bias[i]
    _store(row, out)


def _store(row, out):
    """fp32 to fp32, or to the bits of bf16, rounded to nearest, ties to even."""


@overload(_store, jit_options={"fastmath": True})
def _store_as(row, out):
    def to_bf16(row, out):
        bits = row.view(np.uint32)
        half, one, sixteen = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
        for i in range(len(bits)):
            out[i] = np.uint16((bits[i] + half + ((bits[i] >> sixteen) & one)) >> sixteen)

    def to_fp32(row, out):
        for i in range(len(row)):
            out[i] = row[i]

    return to_bf16 if out.dtype == numba.types.uint16 else to_fp32


@numba.njit(**JIT)
def _mean(rows):
    """The mean colour of [S, 3S]."""
    width = rows.shape[1]
    sums, total = np.empty(width, np.float32), np.zeros(3, np.float64)
    sums[:] = 0
    for y in range(len(rows)):
        row = rows[y]
        for i in range(width):
            sums[i] += row[i]
    for channel in range(3):
        total[channel] = sums[channel::3].sum() / (len(rows) * (width // 3))
    return np.float32(total[0]), np.float32(total[1]), np.float32(total[2])


@numba.njit(**JIT)
def _blur(crop, weights, edge, state):
    """Separable blur of uint8 [S, 3S] into fp32, borders reflected: down the columns, then along the row.

    `edge` is 1 where the outermost pixel is reflected too, 0 where it is not.
    """
    size, width = crop.shape
    reach = REACH
    while weights[reach] < NEGLIGIBLE * weights[0]:
        reach -= 1
    column = np.empty(width + 6 * REACH, np.float32)
    inner = column[3 * REACH : 3 * REACH + width]
    for y in range(size):
        row, weight = crop[y], weights[0]
        for i in range(width):
            inner[i] = weight * row[i]
        for tap in range(1, reach + 1):
            above, below = crop[_reflect(y - tap, size, edge)], crop[_reflect(y + tap, size, edge)]
            weight = weights[tap]
            for i in range(width):
                inner[i] += weight * (np.float32(above[i]) + np.float32(below[i]))
        for pixel in range(1, REACH + 1):
            for channel in range(3):
                column[3 * (REACH - pixel) + channel] = inner[3 * (pixel - edge) + channel]
                column[3 * (REACH + size - 1 + pixel) + channel] = inner[3 * (size - 1 - pixel + edge) + channel]
        target, weight = state[y], weights[0]
        for i in range(width):
            target[i] = weight * inner[i]
        for tap in range(1, reach + 1):
            left, right, weight = column[3 * (REACH - tap) :], column[3 * (REACH + tap) :], weights[tap]
            for i in range(width):
                target[i] += weight * (left[i] + right[i])


@numba.njit(**JIT)
def _reflect(y, size, edge):
    y = y if y >= 0 else -y - edge
    return y if y < size else 2 * (size - 1) - y + edge


@numba.njit(**JIT)
def _turn_hue(row, turn, red, green, blue):
    """HSV's hue turned by `turn` of a full circle, in place; as `reference.adjust_hue`. By planes, which vectorise."""
    for x in range(len(red)):
        red[x], green[x], blue[x] = row[3 * x], row[3 * x + 1], row[3 * x + 2]
    for x in range(len(red)):
        red[x], green[x], blue[x] = _turned(red[x], green[x], blue[x], turn)
    for x in range(len(red)):
        row[3 * x], row[3 * x + 1], row[3 * x + 2] = red[x], green[x], blue[x]


@numba.njit(**JIT)
def _turned(r, g, b, turn):
    value, low = max(r, g, b), min(r, g, b)
    chroma = value - low
    inverse = np.float32(1) / (chroma if chroma > 0 else np.float32(1))
    from_green, from_blue = np.float32(2) + (b - r) * inverse, np.float32(4) + (r - g) * inverse
    hue = (g - b) * inverse if value == r else (from_green if value == g else from_blue)
    hue = hue + np.float32(6) * turn
    return (
        value - chroma * _ramp(hue + np.float32(5)),
        value - chroma * _ramp(hue + np.float32(3)),
        value - chroma * _ramp(hue + np.float32(1)),
    )


@numba.njit(**JIT)
def _ramp(k):
    """Ramp of k modulo 6; turns from -1/2 to 1/2 give k from -3 to 13. Comparisons vectorise, floor does not."""
    six = np.float32(6)
    k = k + six if k < 0 else k
    k = k - six if k >= six else k
    k = k - six if k >= six else k
    return min(max(min(k, np.float32(4) - k), np.float32(0)), np.float32(1))
