"""Ranks that srun starts, from the variables that SLURM sets for the tasks of a step."""

import os
import subprocess
import sys

import pytest

from fastsiam.runtime import slurm
from tests.support.processes import REPOSITORY
from tests.support.refusals import refuses
from tests.support.runs import lines

# Task 5 of `srun --ntasks=7` on three nodes of three, three and one.
STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[017-019]",
}
RANK_5 = {
    "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "gpu017", "MASTER_PORT": str(12_000 + (17 * 1234567 + 3) % 20_000),
}  # fmt: skip


def filled(**environment):
    before = dict(environment)
    slurm.fill_in(environment)
    return {name: value for name, value in environment.items() if before.get(name) != value}


def test_a_task_of_a_step_becomes_a_rank():
    assert filled(**STEP) == RANK_5
    last = {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert filled(**STEP | last)["LOCAL_WORLD_SIZE"] == "1"
    one_node = {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    assert filled(**STEP | one_node)["MASTER_ADDR"] == "127.0.0.1"


def test_what_a_script_sets_itself_stays():
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "7"}
    assert filled(**STEP, **own) == {name: RANK_5[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PTY_PORT": "40001"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "7", "LOCAL_RANK": "0"},
    ],
    ids=["one task", "a shell", "torchrun in each task", "torchrun with as many ranks"],
)
def test_no_rank_is_made_of(changes):
    assert filled(**STEP | changes) == {}


def test_a_batch_script_is_no_step_and_an_old_step_is_one():
    job = {"SLURM_JOB_ID": "8", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert filled(**job, ENVIRONMENT="BATCH") == {}
    assert filled(**job, SLURM_TASKS_PER_NODE="4")["WORLD_SIZE"] == "4"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-005,9],login", "gpu003"), ("r[1-2]c[4,6]", "r1c4"), ("a[7]b", "a7b")],
)
def test_the_first_host(nodes, first):
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_is_refused(name):
    with refuses("mpirun"):
        slurm.fill_in({name: "4"})
    slurm.fill_in({name: "4", "WORLD_SIZE": "4"})


@pytest.mark.slow
def test_two_tasks_are_one_run(tiny, tmp_path):
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "fastsiam.train", "--config", "quickstart.yaml", *tiny("train.epochs=1")]
    tasks = [
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for task in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "ranks     2, 4 images a step each" in said[0]
    assert said[1] == ""
    found = lines(tmp_path / "runs/run")
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, 11))
