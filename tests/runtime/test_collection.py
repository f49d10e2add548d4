"""Garbage collection is paused for the first import of torch, and as it was before afterwards."""

from tests.support.processes import run_python

PROGRAM = """
import gc, sys
from fastsiam.runtime.collection import collection_paused

def inside():
    with collection_paused():
        return gc.isenabled()

print(inside(), gc.isenabled(), gc.get_freeze_count() > 0)
sys.modules["torch"] = None
gc.unfreeze()
print(inside(), gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_collection_is_paused_until_torch_is_imported():
    done = run_python("-c", PROGRAM)
    assert done.stdout.split() == ["False", "True", "True", "True", "True", "False"], done.stderr
