"""Nearest neighbours on a CPU that multiplies bf16: candidates by products in bf16, chosen by products in fp32.

bf16 is 2.4 times as fast as fp32 on an EPYC (208 and 86 GFLOP/s a core), and a product of unit rows is off by a known
bound. A row keeps each column that may be among its k largest under that bound; a second pass over the blocks computes
their products in fp32, of which the k largest are exact.

A product in bf16 is its 16 bits, mapped to an int16 of the same order.
"""

import numba
import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from fastsiam.kernels.numba_cache import KEEPS_CODE
from fastsiam.kernels.threads import as_torch_has

# Columns compared at once, in two registers of AVX-512.
_GROUP = 64
# Unit roundoff of bf16, whose significand has 8 bits, with a little more for the roundings of the bound itself.
_ROUNDOFF = np.float32(1.01 * 2**-8)


def _values_of_keys() -> np.ndarray:
    """The value of each key -32768, ..., 32767; keys beyond the infinities have these."""
    keys = np.arange(-32768, 32768, dtype=np.int32)
    bits = (keys ^ ((keys >> 15) & 0x7FFF)) & 0xFFFF
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    return np.where(np.isnan(values), np.where(keys < 0, -np.inf, np.inf), values).astype(np.float32)


_VALUES = _values_of_keys()


class Candidates:
    """The columns that may be among the `k` largest of each row."""

    def __init__(self, bounds: np.ndarray, k: int, capacity: int):
        """`bounds`: fp32 [rows], above the errors of a row's products, but for the rounding of the result to bf16."""
        rows = len(bounds)
        self._bounds, self._k = bounds, k
        self._keys = np.empty((rows, capacity), np.int16)
        self._places = np.empty((rows, capacity), np.int64)
        self._values = np.empty((rows, capacity), np.float32)
        self._counts = np.zeros(rows, np.int64)
        self._thresholds = np.full(rows, -32768, np.int16)
        self._cursors = np.zeros(rows, np.int64)

    def add(self, block: np.ndarray, first: int) -> None:
        """`block`: bits of bf16 products as int16 [rows, columns], contiguous; `first`: place of its first column."""
        with as_torch_has():
            _add(block, first, self._k, self._bounds, _VALUES, self._keys, self._places, self._counts, self._thresholds)

    def overflown(self) -> np.ndarray:
        """Returns the rows that had too many candidates to keep, once all columns were added; shrinks the others."""
        with as_torch_has():
            _shrink_all(self._k, self._bounds, _VALUES, self._keys, self._places, self._counts)
        return np.flatnonzero(self._counts < 0)

    def compute(self, rows: np.ndarray, columns: np.ndarray, first: int) -> None:
        """The products in fp32 of candidates in a block: `rows` [rows, D], `columns` [columns, D]; blocks in order."""
        with as_torch_has():
            _compute(rows, columns, first, self._places, self._counts, self._cursors, self._values)

    def take(self, values: np.ndarray, places: np.ndarray) -> None:
        """Writes fp32 and int64 [rows, k], the largest first, of equal values that of the lower place."""
        with as_torch_has():
            _take(self._k, self._values, self._places, self._counts, values, places)


@numba.njit(parallel=True, cache=KEEPS_CODE)
def _add(block, first, k, bounds, table, keys, places, counts, thresholds):
    capacity = keys.shape[1]
    for row in numba.prange(len(block)):
        line, kept, where = block[row], keys[row], places[row]
        count, threshold = counts[row], thresholds[row]
        if count < 0:
            continue
        for start in range(0, len(line), _GROUP):
            group = line[start : start + _GROUP]
            if len(group) == _GROUP and not _any_above(group, threshold):
                continue
            above = np.uint64(0)
            for column in range(len(group)):
                above |= np.uint64(_key(group[column]) > threshold) << np.uint64(column)
            while above != 0:
                column = np.int64(trailing_zeros(above))
                above &= above - np.uint64(1)
                kept[count], where[count] = _key(group[column]), first + start + column
                count += 1
                if count == capacity:
                    count, threshold = _shrink(kept, where, count, k, bounds[row], table)
                    if 8 * count > 7 * capacity:
                        count = -1
                        break
            if count < 0:
                break
        counts[row], thresholds[row] = count, threshold


@numba.njit(cache=KEEPS_CODE)
def _key(bits):
    """int16 of the order of the bf16 that has these bits."""
    return np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))


@numba.njit(cache=KEEPS_CODE)
def _any_above(group, threshold):
    found = np.int16(0)
    for column in range(_GROUP):
        found = np.int16(found | np.int16(_key(group[column]) > threshold))
    return found != 0


@numba.njit(parallel=True, cache=KEEPS_CODE)
def _shrink_all(k, bounds, table, keys, places, counts):
    for row in numba.prange(len(keys)):
        if counts[row] > k:
            counts[row], _ = _shrink(keys[row], places[row], counts[row], k, bounds[row], table)


@numba.njit(cache=KEEPS_CODE)
def _shrink(keys, places, count, k, bound, table):
    """Moves the candidates that remain to the front; returns their number and the key that a later one must exceed."""
    low, high = np.int32(-32769), np.int32(32767)
    # The largest key that at least k exceed: the k-th largest is one more.
    while high - low > 1:
        middle = (low + high) // 2
        above = np.int32(0)
        for place in range(count):
            above = np.int32(above + np.int32(keys[place] > middle))
        if above >= k:
            low = middle
        else:
            high = middle
    kth = table[low + 1 + 32768]
    # k products are at least this, less the bound; what is among the k largest is no smaller than they, less its own.
    least = kth - abs(kth) * _ROUNDOFF - 2 * bound
    least -= abs(least) * _ROUNDOFF
    threshold = np.int16(max(np.searchsorted(table, least) - 1, 0) - 32768)
    kept = 0
    for place in range(count):
        if keys[place] > threshold:
            keys[kept], places[kept] = keys[place], places[place]
            kept += 1
    return kept, threshold


@numba.njit(parallel=True, fastmath=True, cache=KEEPS_CODE)
def _compute(rows, columns, first, places, counts, cursors, values):
    end, dim = first + len(columns), rows.shape[1]
    for row in numba.prange(len(rows)):
        cursor, query = cursors[row], rows[row]
        while cursor < counts[row] and places[row, cursor] < end:
            other = columns[places[row, cursor] - first]
            total = np.float32(0)
            for index in range(dim):
                total += query[index] * other[index]
            values[row, cursor] = total
            cursor += 1
        cursors[row] = cursor


@numba.njit(parallel=True, cache=KEEPS_CODE)
def _take(k, values, places, counts, largest, where):
    for row in numba.prange(len(largest)):
        if counts[row] < 0:
            continue
        found = values[row, : counts[row]]
        order = np.argsort(-found, kind="mergesort")[:k]
        for rank in range(len(order)):
            largest[row, rank], where[row, rank] = found[order[rank]], places[row, order[rank]]
