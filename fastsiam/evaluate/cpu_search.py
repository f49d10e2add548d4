"""Exact search of nearest neighbours on a CPU, in blocks that stay in its last cache."""

import math

import numpy as np
import torch

from fastsiam.kernels.candidates_numba import Candidates
from fastsiam.kernels.select_numba import Largest
from fastsiam.runtime.device import multiplies_bf16

BLOCK = 1024
"""Rows of the bank that are compared with a chunk of queries at once."""
# Candidates kept in bf16, beyond 4 k.
_MORE = 256


class Search:
    """Search in one bank, with bf16 for a part of the work where the CPU multiplies it."""

    def __init__(self, bank: torch.Tensor, scale: torch.Tensor):
        """`bank`: [M, D], any floating dtype; `scale`: fp32 [M, 1], which makes unit rows of its rows."""
        self._bank, self._scale = bank, scale
        self._in_bf16 = multiplies_bf16(torch.device("cpu")) and len(bank) > 0
        if self._in_bf16:
            self._measure()

    def __call__(self, queries: torch.Tensor, near: torch.Tensor, which: torch.Tensor, first: int) -> None:
        """Writes cosines and places of the most similar rows into `near` fp32 and `which` int64 [n, k], best first.

        `queries`: unit rows in fp32 [n, D]; `first`: the place of the bank's first row. Of equal cosines the lower
        place comes first.
        """
        capacity = 4 * near.shape[1] + _MORE
        if not self._in_bf16 or len(self._bank) <= 2 * capacity:
            self._find(queries, near, which, first)
            return
        rest = self._find_by_candidates(queries, near, which, first, capacity)
        if len(rest):
            parts = near[rest], which[rest]
            self._find(queries[rest], *parts, first)
            near[rest], which[rest] = parts
        # Such features would be compared twice.
        self._in_bf16 = 2 * len(rest) < len(queries)

    def _blocks(self):
        """Yields the first place of each block of the bank, and its unit rows in fp32."""
        for start in range(0, len(self._bank), BLOCK):
            rows = slice(start, start + BLOCK)
            yield start, torch.mul(self._bank[rows], self._scale[rows]).float()

    def _measure(self):
        """The mean of unit rows, and how far rows without it are from theirs in bf16.

        q . r = q . (r - mean) + q . mean, of which the last changes no order: where all features are alike, bf16 then
        resolves their differences.
        """
        self._mean = sum(rows.sum(0, dtype=torch.float64) for _, rows in self._blocks()).float() / len(self._bank)
        parts = [
            (_rounding(rows - self._mean).max(), (rows - self._mean).norm(dim=1).max()) for _, rows in self._blocks()
        ]
        self._off, self._length = torch.tensor(parts).amax(0).tolist()
        self._in_bf16 = math.isfinite(self._off + self._length)

    def _find(self, queries, near, which, first):
        largest, products = Largest(*near.shape), torch.empty(len(queries) * min(BLOCK, len(self._bank)))
        for start, rows in self._blocks():
            similarity = products[: len(queries) * len(rows)].view(len(queries), len(rows))
            largest.add(torch.mm(queries, rows.T, out=similarity).numpy(), first + start)
        largest.take(near.numpy(), which.numpy())

    def _find_by_candidates(self, queries, near, which, first, capacity) -> np.ndarray:
        """Returns the queries that had too many candidates, whose neighbours are not written."""
        # |q~ . r~ - q . r| <= |q~ - q| |r~| + |q| |r~ - r|, and the rounding of sums in fp32.
        bound = _rounding(queries) * (self._length + self._off) + self._off + 2 * queries.shape[1] * 2.0**-24
        candidates = Candidates(bound.numpy(), near.shape[1], capacity)
        halves = queries.bfloat16()
        products = torch.empty(len(queries) * BLOCK, dtype=torch.bfloat16)
        for start, rows in self._blocks():
            similarity = products[: len(queries) * len(rows)].view(len(queries), len(rows))
            torch.mm(halves, (rows - self._mean).bfloat16().T, out=similarity)
            candidates.add(similarity.view(torch.int16).numpy(), first + start)
        rest = candidates.overflown()
        for start, rows in self._blocks():
            candidates.compute(queries.numpy(), rows.numpy(), first + start)
        candidates.take(near.numpy(), which.numpy())
        return rest


def _rounding(rows):
    """Lengths of what bf16 takes away from rows."""
    return (rows - rows.bfloat16().float()).norm(dim=1)
