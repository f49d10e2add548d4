"""The augmenter on CUDA, in two launches: the mean that contrast needs of each view, then everything else.

A strip of rows is one program's work. The tiles are flat rows of RGB elements, so that loads and stores are 16 bytes
wide; every element fetches the three channels of its pixel, from L1. A blur goes down the columns and along the rows
through a few rows of scratch that stay in L2.
"""

import torch
import triton
import triton.language as tl

from fastsiam.kernels import augment_table, reference

FLIP, SOLARIZE = tl.constexpr(augment_table.FLIP), tl.constexpr(augment_table.SOLARIZE)
EDGE = tl.constexpr(augment_table.EDGE)
BLUR, REACH = tl.constexpr(augment_table.BLUR), tl.constexpr(augment_table.REACH)
COLOR, WIDTH = tl.constexpr(augment_table.COLOR), tl.constexpr(augment_table.WIDTH)
R_WEIGHT, G_WEIGHT, B_WEIGHT = (tl.constexpr(weight) for weight in reference.LUMA)
# Rows and row elements of a tile: 8 elements a thread, 16 bytes of bf16 to store.
ROWS, BLOCK, NUM_WARPS = 4, 256, 4
# A multiprocessor gets as many programs as its registers hold at once: one more would run after all the others. Their
# registers are known once the kernel is compiled (exact, sm_90: 80 with Triton 3.8, 125 with 3.6); until then four
# programs fit in either case. More than five would enlarge the scratch (14 MB at 224 px, a quarter of an H200's L2).
FIRST_PROGRAMS, MOST_PROGRAMS = 4, 5
# 16 elements a thread, 16 bytes of uint8 to load, where the launch for contrast reads each crop once.
CONTRAST_ROWS = 8


def augment_on_cuda(crops, draws, scale, bias, exact, dtype):
    """Runs the op for CUDA tensors; see `augment_views`."""
    num_views, size = crops.shape[:2]
    crops = crops.contiguous()
    out = crops.new_empty(crops.shape, dtype=dtype)
    shift = crops.new_empty(num_views, dtype=torch.float32)
    strips = num_views * triton.cdiv(size, ROWS)
    variant = crops.device, size, exact, dtype
    programs = min(strips, _fitting.get(variant, FIRST_PROGRAMS) * _multiprocessors(crops.device))
    scratch = crops.new_empty((max(programs, num_views if exact else 0), 2, ROWS, 3 * size), dtype=torch.float32)
    _contrast_kernel[(num_views,)](
        crops, draws, shift, scratch, size,
        EXACT=exact, ROWS=ROWS if exact else CONTRAST_ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    compiled = _views_kernel[(programs,)](
        crops, draws, shift, scratch, out, strips, size, *scale, *bias,
        EXACT=exact, ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    if crops.is_cuda and variant not in _fitting:
        registers = torch.cuda.get_device_properties(crops.device).regs_per_multiprocessor
        _fitting[variant] = programs_that_fit(compiled.n_regs, registers)
    return out.permute(0, 3, 1, 2)


# By device, size, colour mode and dtype, which are what the kernel is compiled for.
_fitting = {}


def programs_that_fit(registers: int, of_multiprocessor: int) -> int:
    """Returns the programs to launch a multiprocessor, each of `registers` a thread; a warp's come in units of 256."""
    of_program = NUM_WARPS * triton.cdiv(32 * registers, 256) * 256
    return max(1, min(MOST_PROGRAMS, of_multiprocessor // of_program))


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _contrast_kernel(crops, draws, shift, scratch, size, EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One view a program. matrix: `row @ mean` of the blurred crop; exact: the grey mean at contrast's turn."""
    view = tl.program_id(0).to(tl.int64)
    draws += view * WIDTH
    crop = crops + view * size * size * 3
    if EXACT:
        result = _grey_mean(crop, draws, scratch + view * 2 * ROWS * size * 3, size, ROWS, BLOCK)
    else:
        result = _row_times_mean(crop, draws, size, ROWS, BLOCK)
    tl.store(shift + view, result)


@triton.jit
def _row_times_mean(crop, draws, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Weighs a row or column by how often a blur reads it: once, except near borders reflected without their edge."""
    red, green, blue = tl.load(draws + COLOR + 9), tl.load(draws + COLOR + 10), tl.load(draws + COLOR + 11)
    used = tl.load(draws + COLOR + 12) + tl.load(draws + COLOR + 13) + tl.load(draws + COLOR + 14)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if used != 0:
        for left in range(0, 3 * size, BLOCK):
            element = left + tl.arange(0, BLOCK)
            channel = element % 3
            weight = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
            weight *= _times_read(element // 3, draws, size)
            for top in range(0, size, ROWS):
                rows = top + tl.arange(0, ROWS)
                mask = (rows < size)[:, None] & (element < 3 * size)[None, :]
                value = tl.load(crop + rows[:, None] * (3 * size) + element[None, :], mask=mask, other=0)
                total += value.to(tl.float32) * weight[None, :] * _times_read(rows, draws, size)[:, None]
    return tl.sum(total) / (255.0 * size * size)


@triton.jit
def _times_read(place, draws, size):
    """The sum of the weights with which a blur reads each place of a line."""
    result = tl.full(place.shape, 1.0, tl.float32)
    if (tl.load(draws + BLUR) > 0) & (tl.load(draws + EDGE) == 0):
        for tap in tl.static_range(1, REACH + 1):
            weight = tl.load(draws + BLUR + tap)
            result -= tl.where(place < tap, weight, 0.0) + tl.where(size - 1 - place < tap, weight, 0.0)
            result += tl.where((place > 0) & (place <= tap), weight, 0.0)
            result += tl.where((place < size - 1) & (size - 1 - place <= tap), weight, 0.0)
    return result


@triton.jit
def _grey_mean(crop, draws, scratch, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    # Without a contrast the mean is not used.
    if tl.load(draws + COLOR + 5) != 1.0:
        for top in range(0, size, ROWS):
            rows = top + tl.arange(0, ROWS)
            _blur_strip(crop, draws, scratch, rows, size, ROWS, BLOCK)
            for left in range(0, size, BLOCK):
                pixel = left + tl.arange(0, BLOCK)
                mask = (rows < size)[:, None] & (pixel < size)[None, :]
                r, g, b = _load_pixels(crop, draws, scratch, rows, pixel, mask, size, ROWS)
                r, g, b = _jitter(r, g, b, draws, 0.0, True)
                total += tl.where(mask, R_WEIGHT * r + G_WEIGHT * g + B_WEIGHT * b, 0.0)
    return tl.sum(total) / (size * size)


@triton.jit
def _views_kernel(
    crops, draws, shift, scratch, out, strips, size,
    scale_r, scale_g, scale_b, bias_r, bias_g, bias_b,
    EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Strips of ROWS rows, every num_programs-th of all views."""
    strips_per_view = tl.cdiv(size, ROWS)
    scratch += tl.program_id(0).to(tl.int64) * 2 * ROWS * size * 3
    for strip in range(tl.program_id(0), strips, tl.num_programs(0)):
        view = (strip // strips_per_view).to(tl.int64)
        rows = (strip % strips_per_view) * ROWS + tl.arange(0, ROWS)
        crop, row_of_draws = crops + view * size * size * 3, draws + view * WIDTH
        view_shift = tl.load(shift + view)
        # No value reaches 2: no solarize.
        threshold = tl.where(tl.load(row_of_draws + SOLARIZE) > 0, 0.5, 2.0)
        _blur_strip(crop, row_of_draws, scratch, rows, size, ROWS, BLOCK)
        for left in range(0, 3 * size, BLOCK):
            element = left + tl.arange(0, BLOCK)
            pixel, channel = element // 3, (element % 3)[None, :]
            mask = (rows < size)[:, None] & (element < 3 * size)[None, :]
            flipped = tl.where(tl.load(row_of_draws + FLIP) > 0, size - 1 - pixel, pixel)
            r, g, b = _load_pixels(crop, row_of_draws, scratch, rows, flipped, mask, size, ROWS)
            if EXACT:
                r, g, b = _jitter(r, g, b, row_of_draws, view_shift, False)
                grey = R_WEIGHT * r + G_WEIGHT * g + B_WEIGHT * b
                value = tl.where(channel == 0, r, tl.where(channel == 1, g, b))
                value = tl.where(tl.load(row_of_draws + COLOR + 8) > 0, grey, value)
            else:
                value = _matrix(r, g, b, channel, row_of_draws + COLOR, view_shift)
            value = tl.where(value >= threshold, 1.0 - value, value)
            value *= tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
            value += tl.where(channel == 0, bias_r, tl.where(channel == 1, bias_g, bias_b))
            places = out + view * size * size * 3 + rows[:, None] * (3 * size) + element[None, :]
            tl.store(places, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _blur_strip(crop, draws, scratch, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows blurred into the second half of `scratch`, in [0, 255]; nothing where the view has no blur."""
    width = 3 * size
    inside = scratch + tl.arange(0, ROWS)[:, None] * width
    edge = tl.load(draws + EDGE).to(tl.int32)
    if tl.load(draws + BLUR) > 0:
        for left in range(0, width, BLOCK):
            element = left + tl.arange(0, BLOCK)
            mask = (rows < size)[:, None] & (element < width)[None, :]
            column = tl.zeros([ROWS, BLOCK], tl.float32)
            # Not unrolled: 71 registers a thread instead of 167.
            for tap in range(-REACH, REACH + 1):
                source = _reflect(rows + tap, size, edge)
                value = tl.load(crop + source[:, None] * width + element[None, :], mask=mask, other=0)
                column += tl.load(draws + BLUR + tl.abs(tap)) * value.to(tl.float32)
            tl.store(inside + element[None, :], column, mask=mask)
        # A thread reads what another thread of its program has stored.
        tl.debug_barrier()
        for left in range(0, width, BLOCK):
            element = left + tl.arange(0, BLOCK)
            mask = (rows < size)[:, None] & (element < width)[None, :]
            row = tl.zeros([ROWS, BLOCK], tl.float32)
            for tap in range(-REACH, REACH + 1):
                source = 3 * _reflect(element // 3 + tap, size, edge) + element % 3
                row += tl.load(draws + BLUR + tl.abs(tap)) * tl.load(inside + source[None, :], mask=mask, other=0.0)
            tl.store(inside + ROWS * width + element[None, :], row, mask=mask)
        tl.debug_barrier()


@triton.jit
def _reflect(place, size, edge):
    """Returns the place inside [0, size) that is read for one up to REACH outside; masked ones beyond stay inside."""
    place = tl.where(place < 0, -edge - place, place)
    return tl.maximum(tl.where(place < size, place, 2 * (size - 1) + edge - place), 0)


@triton.jit
def _load_pixels(crop, draws, scratch, rows, pixel, mask, size, ROWS: tl.constexpr):
    """Red, green and blue [ROWS, len(pixel)] in [0, 1], blurred where the view is."""
    if tl.load(draws + BLUR) > 0:
        blurred = scratch + (ROWS + tl.arange(0, ROWS))[:, None] * (3 * size) + 3 * pixel[None, :]
        r = tl.load(blurred, mask=mask, other=0.0)
        g = tl.load(blurred + 1, mask=mask, other=0.0)
        b = tl.load(blurred + 2, mask=mask, other=0.0)
    else:
        places = crop + rows[:, None] * (3 * size) + 3 * pixel[None, :]
        r = tl.load(places, mask=mask, other=0).to(tl.float32)
        g = tl.load(places + 1, mask=mask, other=0).to(tl.float32)
        b = tl.load(places + 2, mask=mask, other=0).to(tl.float32)
    return r * (1.0 / 255.0), g * (1.0 / 255.0), b * (1.0 / 255.0)


@triton.jit
def _matrix(r, g, b, channel, color, shift):
    """One row of the 3x4 matrix at each element, clamped."""
    red = tl.where(channel == 0, tl.load(color), tl.where(channel == 1, tl.load(color + 3), tl.load(color + 6)))
    green = tl.where(channel == 0, tl.load(color + 1), tl.where(channel == 1, tl.load(color + 4), tl.load(color + 7)))
    blue = tl.where(channel == 0, tl.load(color + 2), tl.where(channel == 1, tl.load(color + 5), tl.load(color + 8)))
    column = tl.where(
        channel == 0, tl.load(color + 12), tl.where(channel == 1, tl.load(color + 13), tl.load(color + 14))
    )
    return _clamp(red * r + green * g + blue * b + column * shift)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _jitter(r, g, b, draws, grey_mean, BEFORE_CONTRAST: tl.constexpr):
    """torchvision's ColorJitter in the drawn order; BEFORE_CONTRAST: only what comes before contrast."""
    going = 1
    for step in tl.static_range(4):
        operation = tl.load(draws + COLOR + step).to(tl.int32)
        factor = tl.load(draws + COLOR + 4 + operation)
        if operation == 1:
            if BEFORE_CONTRAST:
                going = 0
            else:
                rest = (1.0 - factor) * grey_mean
                r, g, b = _clamp(factor * r + rest), _clamp(factor * g + rest), _clamp(factor * b + rest)
        elif going != 0:
            if operation == 0:
                r, g, b = _clamp(factor * r), _clamp(factor * g), _clamp(factor * b)
            elif operation == 2:
                rest = (1.0 - factor) * (R_WEIGHT * r + G_WEIGHT * g + B_WEIGHT * b)
                r, g, b = _clamp(factor * r + rest), _clamp(factor * g + rest), _clamp(factor * b + rest)
            elif factor != 0.0:
                r, g, b = _turn_hue(r, g, b, factor)
    return r, g, b


@triton.jit
def _turn_hue(r, g, b, turn):
    """Turns hue as `reference.adjust_hue` does."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    inverse = 1.0 / tl.where(chroma > 0, chroma, 1.0)
    hue = tl.where(value == g, 2.0 + (b - r) * inverse, 4.0 + (r - g) * inverse)
    hue = tl.where(value == r, (g - b) * inverse, hue) + 6.0 * turn
    return value - chroma * _ramp(5.0 + hue), value - chroma * _ramp(3.0 + hue), value - chroma * _ramp(1.0 + hue)


@triton.jit
def _ramp(k):
    k -= 6.0 * tl.floor(k / 6.0)
    return _clamp(tl.minimum(k, 4.0 - k))
