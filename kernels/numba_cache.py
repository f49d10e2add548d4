"""Place in which numba keeps compiled code: beside the kernels, in HOME's cache, below TMPDIR, or none.

Import it before a kernel is defined: numba looks for the place then, and raises where it finds none.
"""

import os
from pathlib import Path

import numba

from fastsiam.runtime.cache_dirs import home_folder, temporary_root


def _finds_a_place():
    # Without a home numba would write to a folder named ~ in the working directory.
    if not numba.config.CACHE_DIR and home_folder() is None and not os.access(Path(__file__).parent, os.W_OK):
        return False
    try:
        numba.njit(cache=True)(_finds_a_place)
    except RuntimeError:
        return False
    return True


KEEPS_CODE = _finds_a_place()
NOTE = ""
"""Sentence that a run prints about an unusual place; empty for a usual one."""
if not KEEPS_CODE:
    root = temporary_root()
    if root is not None:
        # The variable is for processes that are started from here; numba has read it already.
        os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(root / "numba")
        KEEPS_CODE = _finds_a_place()
    kept = f"kept in {root / 'numba'}" if KEEPS_CODE else "kept nowhere"
    NOTE = f"numba's code is {kept}: neither the package's folder nor HOME can be written; set NUMBA_CACHE_DIR"
