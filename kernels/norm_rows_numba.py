"""Loops of the CPU's batch norm over a tile: some rows of images side by side, whose channels take turns.

A tile is as long as the first-level cache holds a few of, so that loops are long where channels are few, and what lies
between reading and writing stays in fp32. bf16 is widened and rounded in registers.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastsiam.kernels.numba_cache import KEEPS_CODE

# A product and a sum may be rounded once; NaN and infinity stay what they are.
JIT = {"fastmath": {"contract"}, "cache": KEEPS_CODE}
# Values of a tile, or one row where there are more channels; tiles of a part, and of a sum in fp32, which is then added
# to one in fp64: sums of 64 had 2 to 3 times the error.
TILE, TILES, IN_FP32 = 1024, 64, 4
# The rows of what belongs to a place of the tile lie this far apart in one array, a constant: otherwise LLVM does not
# see that they do not overlap, and does not vectorise. As it is, a loop takes 0.15 to 0.35 ns a value.
ROW = 4096 + 16
MOST_CHANNELS = 4096


@numba.njit(**JIT)
def tile_of(channels):
    return max(TILE // channels, 1) * channels


@numba.njit(**JIT)
def parts_of(length, channels):
    """Values of a tile and of a part, and how many parts a view of so many values has."""
    tile = tile_of(channels)
    step = TILES * tile
    return tile, step, (length + step - 1) // step


@numba.njit(**JIT)
def place_of(number, parts, step, length):
    """View, begin and end of a part, where views have so many parts each."""
    begin = number % parts * step
    return number // parts, begin, min(begin + step, length)


@intrinsic
def wide(context, value):
    """fp32 of a value: itself, or what its 16 bits are in bf16."""

    def generate(context, builder, signature, arguments):
        if signature.args[0] == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(value), generate


@intrinsic
def as_stored(context, value, like):
    """A value in fp32 as what it is stored as: itself, or the bits of the nearest bf16, ties to even."""

    def generate(context, builder, signature, arguments):
        if signature.args[1] == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd), ir.Constant(word, 16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, ir.Constant(word, 0x7FC0), rounded), ir.IntType(16))

    return like(types.float32, like), generate


@numba.njit(**JIT)
def repeated(rows, tile):
    """Rows [k, C] over a tile, one behind the other at the distance of `ROW`."""
    out = np.empty(rows.shape[0] * ROW, np.float32)
    for row in range(rows.shape[0]):
        for i in range(tile):
            out[row * ROW + i] = rows[row, i % rows.shape[1]]
    return out


# `norm` below is `repeated` of mean, factor and bias, for gradients also the mean of g and the slope. `floor` is 0 with
# a ReLU and minus infinity without. NaN is below no floor, as in torch.


@numba.njit(**JIT)
def normalise(x, norm, floor, out):
    for i in range(len(x)):
        value = (wide(x[i]) - norm[i]) * norm[ROW + i] + norm[2 * ROW + i]
        out[i] = as_stored(floor if value < floor else value, out[i])


@numba.njit(**JIT)
def normalise_and_add(x, norm, added, floor, out):
    for i in range(len(x)):
        value = (wide(x[i]) - norm[i]) * norm[ROW + i] + norm[2 * ROW + i] + wide(added[i])
        out[i] = as_stored(floor if value < floor else value, out[i])


@numba.njit(**JIT)
def take_deviations(x, center, sums):
    """Adds x - center and its square to two rows of sums."""
    for i in range(len(x)):
        deviation = wide(x[i]) - center[i]
        sums[i] += deviation
        sums[ROW + i] += deviation * deviation


@numba.njit(**JIT)
def mask_one(grad, y, floor, line, out):
    """Writes the gradient below a join's ReLU, in fp32 and as it is stored."""
    for i in range(len(y)):
        value = np.float32(0) if wide(y[i]) <= floor else wide(grad[i])
        line[i] = value
        out[i] = as_stored(value, out[i])


@numba.njit(**JIT)
def mask_two(grad, other, y, floor, line, out):
    """As `mask_one`, of the sum of two users' gradients."""
    for i in range(len(y)):
        value = np.float32(0) if wide(y[i]) <= floor else wide(grad[i]) + wide(other[i])
        line[i] = value
        out[i] = as_stored(value, out[i])


@numba.njit(**JIT)
def _below_relu(grad, deviation, norm, i, floor):
    """The gradient below the ReLU, whose input is computed again."""
    return np.float32(0) if deviation * norm[ROW + i] + norm[2 * ROW + i] <= floor else grad


@numba.njit(**JIT)
def take_gradient(grad, x, norm, floor, sums):
    """Adds g and g (x - mean), where g is `grad` below the ReLU, to two rows of sums."""
    for i in range(len(x)):
        deviation = wide(x[i]) - norm[i]
        g = _below_relu(wide(grad[i]), deviation, norm, i, floor)
        sums[i] += g
        sums[ROW + i] += g * deviation


@numba.njit(**JIT)
def take_second(g, x, norm, sums):
    """Adds g (x - mean) to the third row of sums."""
    for i in range(len(x)):
        sums[2 * ROW + i] += g[i] * (wide(x[i]) - norm[i])


@numba.njit(**JIT)
def gradient_of_input(grad, x, norm, floor, out):
    for i in range(len(x)):
        deviation = wide(x[i]) - norm[i]
        g = _below_relu(wide(grad[i]), deviation, norm, i, floor)
        below = g - norm[3 * ROW + i] - deviation * norm[4 * ROW + i]
        out[i] = as_stored(norm[ROW + i] * below, out[i])


@numba.njit(**JIT)
def hand_on(sums, tile, totals):
    """Adds rows in fp32 to totals [k, tile] in fp64, and begins anew."""
    for row in range(len(totals)):
        for i in range(tile):
            totals[row, i] += sums[row * ROW + i]
            sums[row * ROW + i] = np.float32(0)


@numba.njit(**JIT)
def fold(totals, out):
    """Adds [k, tile] up to [k, C]."""
    channels = out.shape[1]
    for row in range(len(out)):
        for channel in range(channels):
            value = np.float64(0)
            for i in range(channel, totals.shape[1], channels):
                value += totals[row, i]
            out[row, channel] = value
