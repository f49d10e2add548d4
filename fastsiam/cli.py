"""How the commands that train answer what goes wrong: a sentence on stderr, and an exit code."""

import os
import signal
import sys
from collections.abc import Callable

from fastsiam.errors import UserError
from fastsiam.runtime import slurm
from fastsiam.runtime.cores import usable_cores


def speaks() -> bool:
    """Of the processes of a machine one says what all of them meet before they know each other."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def prepare_process() -> None:
    """What a command that trains does before it imports torch, which reads these variables."""
    slurm.fill_in(os.environ)
    let_threads_sleep()
    keep_to_quota()


def keep_to_quota() -> None:
    """As many threads as a CPU quota keeps busy, where OMP_NUM_THREADS does not say; torch sees the affinity only."""
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())


def let_threads_sleep() -> None:
    """At OpenMP's barriers, after a few microseconds; to be called before torch is imported.

    Threads that spin there starve the decoder's on small machines: with both cores of a 2-core CPU busy, a step of the
    quickstart takes 1.3 to 3.1 s spinning and 0.4 to 0.5 s sleeping. Most waits there are shorter than falling asleep
    takes: where nothing else runs, 1,000 turns before it gave 981 to 1,134 images/s in place of 836 to 975, and beside
    other jobs no fewer (benchmarks/NOTES.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def refused(error: UserError) -> int:
    """The exit code of a mistake on the command line, which all processes of a machine have made."""
    if speaks():
        print(f"fastsiam: {error}", file=sys.stderr)
    return 2


def answered(work: Callable[[], int], *, gone: str, stopped: str) -> int:
    """The exit code of `work`, or 2 for a mistake that a sentence explains.

    `gone` is said where another process of the run has ended (1), `stopped` at Ctrl-C (130).
    """
    try:
        return work()
    except (UserError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        print(f"fastsiam: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from fastsiam.runtime.distributed import is_lost_peer

        if _is_short_of_host_memory(error):
            print(f"fastsiam: {_OUT_OF_MEMORY}", file=sys.stderr)
            return 2
        if not is_lost_peer(error):
            raise
        first = str(error).partition(". ")[0].partition("\n")[0]
        print(f"fastsiam: {gone} ({first})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastsiam: {stopped}", file=sys.stderr)
        return 128 + signal.SIGINT


_OUT_OF_MEMORY = (
    "out of memory: this machine does not have what a step needs on the CPU; set a smaller train.batch_size, "
    "views.size, views.count or model.width"
)


def _is_short_of_host_memory(error):
    # For a tensor torch raises a RuntimeError that its type does not tell from others.
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
