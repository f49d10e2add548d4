"""Ranks started by srun: sets torchrun's variables from those of a SLURM step."""

import re
from collections.abc import MutableMapping

from fastsiam.errors import UserError

# Below the ports that Linux assigns by itself (net.ipv4.ip_local_port_range), above those of services.
_FIRST_PORT, _PORTS = 12_000, 20_000


def fill_in(environment: MutableMapping[str, str]) -> None:
    """Sets torchrun's variables where `srun --ntasks=N` has started this process as one of N > 1.

    Variables that are set already stay. Nothing changes under torchrun, and where a script sets another WORLD_SIZE.
    Raises `UserError` for processes of mpirun, which has no variable for the address of the first of them.
    """
    size = _tasks(environment)
    if size == 1:
        _refuse_mpirun(environment)
    if size == 1 or environment.get("WORLD_SIZE", str(size)) != str(size) or "LOCAL_RANK" in environment:
        return
    per_node = _per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", environment["SLURM_PROCID"]),
        "LOCAL_WORLD_SIZE": str(per_node[node] if node < len(per_node) else size),
        "MASTER_ADDR": first_host(nodes) if len(per_node) > 1 else "127.0.0.1",
        # The tasks of a step compute the same port, those of another step or job mostly another one.
        "MASTER_PORT": str(_FIRST_PORT + (17 * job + step) % _PORTS),
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """Returns the first host of a list in SLURM's short form: gpu003 of `gpu[003-005,9],login`."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name)


def _tasks(environment):
    """Returns the number of tasks of this process's srun step; 1 outside of a step."""
    # The other tasks of `srun --pty` do not run the commands typed in its shell.
    if "SLURM_PROCID" not in environment or "SLURM_PTY_PORT" in environment:
        return 1
    if "SLURM_STEP_NUM_TASKS" in environment:
        return int(environment["SLURM_STEP_NUM_TASKS"])
    # A batch script is not a step, although it has the job's number of tasks and a task's id.
    if environment.get("ENVIRONMENT") == "BATCH":
        return 1
    return int(environment.get("SLURM_NTASKS", "1"))


def _per_node(text):
    """Returns the tasks on each node: [4, 4, 3] for `4(x2),3`."""
    counts = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def _refuse_mpirun(environment):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(environment.get(name, "1")) > 1 and "WORLD_SIZE" not in environment:
            raise UserError(
                f"{name}={environment[name]}: processes of mpirun would train alone; start them with "
                "torchrun --nproc-per-node N -m fastsiam.train ..., or with srun --ntasks=N",
                "mpirun",
            )
