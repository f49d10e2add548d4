"""numba's threads beside torch's: the same number, and torch's left as it was."""

import contextlib

import numba
import torch


@contextlib.contextmanager
def as_torch_has():
    """Runs numba with torch's number of threads inside the block; gives that number."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield numba.get_num_threads()
    finally:
        # When numba starts its OpenMP threads it sets the process's number of them, which is torch's too.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
