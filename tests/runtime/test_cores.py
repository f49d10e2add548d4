"""Threads for the cores that a process may use, not for those that the machine has."""

import math
import os
import re

import pytest
import torch.distributed as dist

from fastsiam import cli
from fastsiam.runtime import cores
from fastsiam.runtime.distributed import World
from tests.support.processes import run_python

BOUND = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from fastsiam.data.backends.dali import open_backend as dali
from fastsiam.data.backends.pil import open_backend as pil
from fastsiam.data.sources.open import open_source
source = open_source(%r)
for open_backend in (dali, pil):
    for workers in (None, 0, 3):
        print(open_backend(source, (16,), 4, workers, torch.device("cpu")).description)
"""


@pytest.mark.parametrize(
    ("allowed", "quota", "whole"), [(8, float("inf"), 8), (8, 2.5, 2), (8, 0.5, 1), (1, 4.0, 1), (96, 96.0, 96)]
)
def test_whole_cores(allowed, quota, whole):
    assert cores.whole_cores(allowed, quota) == whole


@pytest.mark.slow
def test_decoders_follow_affinity(photos):
    done = run_python("-c", BOUND % str(photos))
    found = re.findall(r"(\d+|no) (?:threads|workers)", done.stdout)
    assert found == ["1", "1", "3", "1", "no", "3"], done.stderr


CPUACCT = "sys/fs/cgroup/cpu,cpuacct"
V1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/docker/a1\n5:memory:/docker/a1\n0::/\n",
    f"{CPUACCT}/cpu.cfs_quota_us": "-1",
    f"{CPUACCT}/cpu.cfs_period_us": "100000",
}
OWN = {f"{CPUACCT}/docker/a1/cpu.cfs_quota_us": "300000", f"{CPUACCT}/docker/a1/cpu.cfs_period_us": "100000"}
V2 = {"proc/self/cgroup": "0::/slurm/job/step\n", "sys/fs/cgroup/slurm/job/step/cpu.max": "max 100000\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        (V2, math.inf),
        (V2 | {"sys/fs/cgroup/slurm/job/cpu.max": "150000 100000\n"}, 1.5),
        (V2 | {"sys/fs/cgroup/slurm/job/cpu.max": "400000 1000", "sys/fs/cgroup/slurm/cpu.max": "2000 1000"}, 2.0),
        # A container's own view.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (V1, math.inf),
        (V1 | {f"{CPUACCT}/cpu.cfs_quota_us": "250000"}, 2.5),
        (V1 | OWN, 3.0),
    ],
)
def test_the_tightest_quota_counts(put, files, expected):
    assert cores.cpu_quota(put(files)) == expected


@pytest.mark.parametrize(("usable", "own", "set_to"), [(1, None, "1"), (1, "7", "7"), (10_000, None, None)])
def test_torch_keeps_to_a_quota(monkeypatch, usable, own, set_to):
    monkeypatch.setenv("OMP_NUM_THREADS", own or "")
    if own is None:
        os.environ.pop("OMP_NUM_THREADS")
    monkeypatch.setattr(cli, "usable_cores", lambda: usable)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    cli.keep_to_quota()
    assert os.environ.get("OMP_NUM_THREADS") == set_to


def test_ranks_bound_to_their_own_cores_share_none(ranks):
    assert ranks(2, _sharing, [{0, 1}, {1, 2}]) == [2, 2]
    assert ranks(2, _sharing, [{0}, {1}]) == [1, 1]


def _sharing(cores_of):
    world = World(dist.get_rank(), dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: cores_of[world.rank])
        return world.ranks_on_these_cores()
