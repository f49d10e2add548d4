#!/usr/bin/env bash
# torch on a CPU: a thread that trains waits at barriers by spinning, until any other thread has once run a parallel
# operation. From then on both of its OpenMP threads sleep in every operation, though the other ones are idle:
# libgomp counts the threads of all pools, busy or not, and lets none spin where they are more than the cores.
#
# Needs Linux, two cores and Python 3.11 or later; installs torch 2.14.1 into a temporary folder (PY=PYTHON uses one
# that has torch already, TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while torch
# behaves as described. Seen with torch 2.14.1 on two cores, GOMP_SPINCOUNT set to 10,000,000 so that none falls asleep:
#   torch 2.14.1
#   1000 operations in a thread: threads fell asleep 0 times; after one operation in the main thread: 2000 times
# Without the variable it was 122 and 2,000. A step of a small network, some hundred operations of 50 us, took 1.6 times
# as long. Way round it: let warm-up, evaluation or loading run in a thread that ends; its pool ends with it.
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1 numpy
fi
OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000000 "$PY" - <<'P'
import os
import sys
import threading
from pathlib import Path

# libgomp counts the cores of the process as it starts.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch

print("torch", torch.__version__)
OPERATIONS = 1000


def times_asleep():
    lines = [line for task in Path("/proc/self/task").iterdir() for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def operations(count):
    x = torch.zeros(1 << 18)
    for _ in range(count):
        x.add_(1)
        for _ in range(1000):
            pass  # some microseconds of Python, as between the operations of a step


def in_a_thread():
    found = []

    def measured():
        operations(100)
        before = times_asleep()
        operations(OPERATIONS)
        found.append(times_asleep() - before)

    thread = threading.Thread(target=measured)
    thread.start()
    thread.join()
    return found[0]


alone = in_a_thread()
operations(1)
beside = in_a_thread()
print(
    f"{OPERATIONS} operations in a thread: threads fell asleep {alone} times; after one operation in the main thread: "
    f"{beside} times"
)
sys.exit(0 if alone < OPERATIONS / 10 and beside > OPERATIONS else 1)
P
