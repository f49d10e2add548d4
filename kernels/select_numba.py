"""The k largest of each row of a matrix that arrives in blocks of columns, on the CPU, compiled by numba.

A row keeps up to 2k candidates in the order of their columns. A column enters where it exceeds the k-th largest of
those before it; few do after the first blocks, and reading the block once is most of the work. Whenever a row is full,
its k largest stay, so that its threshold rises with the logarithm of the number of columns.
"""

import numba
import numpy as np

from fastsiam.kernels.numba_cache import KEEPS_CODE
from fastsiam.kernels.threads import as_torch_has

# Columns compared at once: four registers of AVX-512.
_GROUP = 64


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
    columns = block.shape[1]
    for row in numba.prange(len(block)):
        count, threshold = counts[row], thresholds[row]
        for start in range(0, columns, _GROUP):
            end = min(start + _GROUP, columns)
            above = 0
            for column in range(start, end):
                above += block[row, column] > threshold
            if above == 0:
                continue
            for column in range(start, end):
                value = block[row, column]
                if value > threshold:
                    values[row, count], places[row, count] = value, first + column
                    count += 1
                    if count == 2 * k:
                        count, threshold = k, _halve(values[row], places[row], k)
        counts[row], thresholds[row] = count, threshold


@numba.njit(cache=KEEPS_CODE)
def _halve(values, places, k):
    """Moves the k largest of 2k to the front, in the order they have; returns the smallest of them."""
    threshold = np.partition(values, k)[k]
    equal = k
    for value in values:
        equal -= value > threshold
    kept = 0
    for column in range(2 * k):
        value = values[column]
        if value > threshold or (value == threshold and equal > 0):
            equal -= value == threshold
            values[kept], places[kept] = value, places[column]
            kept += 1
    return threshold


@numba.njit(parallel=True, cache=KEEPS_CODE)
def _take(k, values, places, counts, largest, where):
    for row in numba.prange(len(largest)):
        found = values[row, : counts[row]]
        # Stable: of equal values the first stays first.
        order = np.argsort(-found, kind="mergesort")[:k]
        largest[row], where[row] = -np.inf, 0
        for rank in range(len(order)):
            largest[row, rank], where[row, rank] = found[order[rank]], places[row, order[rank]]
