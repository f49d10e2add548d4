"""Freed memory stays with the process, and goes back when asked."""

import pytest

from tests.support.processes import run_python

# 200 MB as a step's activations: several blocks above and below the size that glibc hands back by default.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from fastsiam.runtime import malloc

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

def step():
    blocks = [torch.ones(size << 18) for size in (40, 90, 8, 64)]
    return sum(block.sum() for block in blocks)

def faults(calls=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls

step()
print(faults(), resident())
malloc.keep_freed()
# The first steps find the places where blocks fit.
faults()
print(faults(), resident())
malloc.give_back_freed()
print(0, resident())
"""


@pytest.mark.slow
def test_a_step_takes_its_memory_from_the_last_one():
    lines = run_python("-c", SCRIPT).stdout.splitlines()
    (default, at_first), (kept, within), (_, at_last) = (map(float, line.split()) for line in lines)
    # 202 MiB are 51,700 pages.
    assert default > 45_000
    assert kept < 5_000
    assert within - at_first > 150
    assert at_last - at_first < 20


@pytest.mark.parametrize("library", [("musl", "1.2"), ("", "")])
def test_other_c_libraries_are_left_alone(monkeypatch, library):
    from fastsiam.runtime import malloc

    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: library)
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)
    assert malloc.keep_freed() is False
    malloc.give_back_freed()
