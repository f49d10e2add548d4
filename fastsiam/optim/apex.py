"""Search for the importable apex, without running any of it."""

import importlib.machinery
import importlib.util
from typing import NamedTuple

APEX_SOURCE = "from source with the nvcc of torch's CUDA version (github.com/NVIDIA/apex)"


class Apex(NamedTuple):
    origin: str
    """Path of its `__init__.py`."""
    is_nvidias: bool
    """Another project on the package index has the name, and no apex.optimizers."""


def find_apex() -> Apex | None:
    """The package that `import apex` would give; None where there is none."""
    spec = importlib.util.find_spec("apex")
    # A folder named apex, such as a clone, is found as well, without an origin.
    if spec is None or spec.origin is None:
        return None
    # Looked up without importing the parent: another project's package may do or lack anything.
    optimizers = importlib.machinery.PathFinder.find_spec("apex.optimizers", spec.submodule_search_locations)
    return Apex(spec.origin, optimizers is not None)
