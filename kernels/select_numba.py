"""The k largest of each row of a matrix that arrives in blocks of columns, on the CPU, compiled by numba.

A row keeps up to 2k candidates in the order of their columns. A column enters where it exceeds the k-th largest of
those before it; few do after the first blocks, and reading the block once is most of the work. Whenever a row is full,
its k largest stay, so that its threshold rises with the logarithm of the number of columns.
"""

import numba
import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from fastsiam.kernels.numba_cache import KEEPS_CODE
from fastsiam.kernels.threads import as_torch_has

# Columns compared at once, in four registers of AVX-512: 16 a nanosecond on one core of an EPYC.
_GROUP = 64
# Of 2k candidates so many eighths of k may stay.
_SLACK = 8


class Largest:
    """The `k` largest of each of `rows` rows; of equal values the one that came first.

    NaN is never among them. Rows that have had fewer than k columns end in -inf, and place 0.
    """

    def __init__(self, rows: int, k: int):
        self._k = k
        self._values = np.empty((rows, 2 * k), np.float32)
        self._places = np.empty((rows, 2 * k), np.int64)
        self._counts = np.zeros(rows, np.int64)
        self._thresholds = np.full(rows, -np.inf, np.float32)

    def add(self, block: np.ndarray, first: int) -> None:
        """`block`: fp32 [rows, columns], contiguous; `first`: the place of its first column, above all before."""
        with as_torch_has():
            _add(block, first, self._k, self._values, self._places, self._counts, self._thresholds)

    def take(self, values: np.ndarray, places: np.ndarray) -> None:
        """Writes fp32 and int64 [rows, k], the largest first."""
        with as_torch_has():
            _take(self._k, self._values, self._places, self._counts, values, places)


@numba.njit(parallel=True, cache=KEEPS_CODE)
def _add(block, first, k, values, places, counts, thresholds):
    for row in numba.prange(len(block)):
        line, kept, where = block[row], values[row], places[row]
        count, threshold = counts[row], thresholds[row]
        for start in range(0, len(line), _GROUP):
            group = line[start : start + _GROUP]
            if len(group) == _GROUP and not _any_above(group, threshold):
                continue
            # A bit a column: a branch for each of the 64 takes longer than all comparisons.
            above = np.uint64(0)
            for column in range(len(group)):
                above |= np.uint64(group[column] > threshold) << np.uint64(column)
            while above != 0:
                column = np.int64(trailing_zeros(above))
                above &= above - np.uint64(1)
                kept[count], where[count] = group[column], first + start + column
                count += 1
                if count == 2 * k:
                    count, threshold = _shrink(kept, where, k)
        counts[row], thresholds[row] = count, threshold


@numba.njit(cache=KEEPS_CODE)
def _any_above(group, threshold):
    found = np.int32(0)
    for column in range(_GROUP):
        found |= np.int32(group[column] > threshold)
    return found != 0


@numba.njit(cache=KEEPS_CODE)
def _shrink(values, places, k):
    """Moves the k largest of 2k, or a few more, to the front in the order they have.

    Returns their number, and a threshold below which, and at which, no later value is among the k largest.
    """
    low, high = values[0], values[0]
    for value in values:
        low, high = min(low, value), max(high, value)
    kept, most = 2 * k, k + k // _SLACK
    # Counting is vectorised: a threshold between two values is found in 2 us of 400, numba's partition takes 11.
    for _ in range(24):
        middle = low + (high - low) * np.float32(0.5)
        above = _count_above(values, middle)
        if above < k:
            high = middle
            continue
        low, kept = middle, above
        if kept <= most:
            break
    equal = 0
    if kept > most:
        # Values that are equal, or not finite.
        low = np.partition(values, k)[k]
        equal = k - _count_above(values, low)
    kept = 0
    for column in range(2 * k):
        value = values[column]
        if value > low or (value == low and equal > 0):
            equal -= value == low
            values[kept], places[kept] = value, places[column]
            kept += 1
    return kept, low


@numba.njit(cache=KEEPS_CODE)
def _count_above(values, threshold):
    count = np.int32(0)
    for value in values:
        # A sum of 64 bits, which numba would take, is not vectorised as well.
        count = np.int32(count + np.int32(value > threshold))
    return count


@numba.njit(parallel=True, cache=KEEPS_CODE)
def _take(k, values, places, counts, largest, where):
    for row in numba.prange(len(largest)):
        found = values[row, : counts[row]]
        # Stable: of equal values the first stays first.
        order = np.argsort(-found, kind="mergesort")[:k]
        largest[row], where[row] = -np.inf, 0
        for rank in range(len(order)):
            largest[row, rank], where[row, rank] = found[order[rank]], places[row, order[rank]]
