"""The batch script of runtime/README.md, run by a bash among commands that do what SLURM's would."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY
from tests.support.runs import TINY, lines, wait_for_step

# The step's process is the command itself, as under slurmstepd: signals to the step go to this process.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> srun_options; shift; done
echo $$ > step.tmp && mv step.tmp step
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$*" >> scontrol_calls; fi
"""
# A step that ends as `left` says, without a run.
SRUN_LEAVING = """#!/bin/bash
[[ -f left ]] && mkdir -p runs/r50_b4096 && cp left runs/r50_b4096/status.json
exit 1
"""
REQUEUED = "requeue {}\n"


def script():
    """Returns the only block of the page that begins like a batch script."""
    page = (REPOSITORY / "fastsiam/runtime/README.md").read_text()
    (found,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)
    return found


class Job:
    """A job in `folder`: `start` is what happens when the queue lets it run, again after a requeue."""

    def __init__(self, folder: Path, srun: str, arguments: list[str]):
        self.folder, self.arguments = folder, arguments
        self.run_folder = folder / "runs/r50_b4096"
        (folder / "bin").mkdir()
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "train.sbatch").write_text(script().replace("--config r50_100ep_b4096.yaml", "--config quickstart"))
        self.number = str(_free_port())

    def start(self, **environment):
        commands = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {
            "SLURM_JOB_ID": self.number,
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_PER_TASK": "2",
        }
        own = {"PATH": commands, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            ["bash", "train.sbatch", *self.arguments],
            cwd=self.folder,
            env={**os.environ, **slurm, **own, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @property
    def requeues(self):
        calls = self.folder / "scontrol_calls"
        return calls.read_text() if calls.exists() else ""

    @property
    def status(self):
        return json.loads((self.run_folder / "status.json").read_text())


def _free_port():
    """A number whose port of the script is free: 20000 and the number, which is below 10000."""
    for number in range(os.getpid() % 10000, 10000):
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("", 20000 + number))
            return number
    raise AssertionError("no port is free")


@pytest.fixture
def job(tmp_path, demo_folder):
    def make(*more, srun=SRUN):
        data = (f"data.train={demo_folder}/train", f"data.val={demo_folder}/val")
        return Job(tmp_path, srun, [*TINY, *data, "train.epochs=3", *more])

    return make


def test_the_script_asks_for_what_the_text_says():
    asked = re.findall(r"^#SBATCH (\S+)$", script(), re.MULTILINE)
    assert {"--signal=USR1@300", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)
    (given,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script())
    assert int(given) < 300


@pytest.mark.slow
def test_the_end_of_its_time_requeues_a_job_that_then_is_done(job):
    job = job("views.size=32", "model.width=16", "train.batch_size=16", "checkpoint.every_seconds=1000")
    shell = job.start()
    wait_for_step(shell, job.run_folder, 3)
    # proctrack/cgroup signals the step's first process alone, which is torchrun.
    os.kill(int((job.folder / "step").read_text()), signal.SIGUSR1)
    said, errors = shell.communicate(timeout=60)
    assert job.status["status"] == "preempted", errors
    assert "stopped   at step" in said
    step = job.status["step"]
    assert 3 <= step < 15
    assert job.requeues == REQUEUED.format(job.number)
    said, errors = job.start().communicate(timeout=60)
    assert job.status["status"] == "done", errors
    assert job.requeues == REQUEUED.format(job.number)
    assert [line["step"] for line in lines(job.run_folder) if line["kind"] == "resume"] == [step]
    assert [line["step"] for line in lines(job.run_folder) if line["kind"] == "train"] == list(range(1, 16))
    assert (job.folder / "srun_options").read_text() == 2 * "--kill-on-bad-exit=0\n"


@pytest.mark.slow
def test_a_run_that_fails_is_not_requeued(job):
    job = job("optimizer.base_lr=1e30")
    batch = job.folder / "train.sbatch"
    text = batch.read_text()
    # With restarts the same answer comes three starts later.
    batch.write_text(text.replace("--max-restarts 3", "--max-restarts 0"))
    assert batch.read_text() != text
    _, errors = job.start().communicate(timeout=60)
    assert job.status["status"] == "failed", errors
    assert job.status["exit_code"] == 4
    assert job.requeues == ""


@pytest.mark.parametrize(
    ("status", "restarts", "requeues"),
    [
        ("preempted", 0, 1),
        ("preempted", 50, 0),
        ("running", 0, 1),
        ("running", 49, 1),
        ("done", 0, 0),
        ("collapsed", 0, 0),
        ("failed", 0, 0),
        (None, 0, 0),
    ],
)
def test_what_is_requeued(job, status, restarts, requeues):
    job = job(srun=SRUN_LEAVING)
    if status is not None:
        (job.folder / "left").write_text(json.dumps({"status": status, "step": 7}))
    job.start(**{"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}).communicate(timeout=60)
    assert job.requeues == requeues * REQUEUED.format(job.number)
