"""Exit codes and error output of the commands that train: one sentence on stderr, never a traceback for a mistake."""

import os
import signal
import sys
from collections.abc import Callable

from fastsiam.errors import ExitCode, UserError
from fastsiam.runtime import slurm
from fastsiam.runtime.cores import usable_cores


def prepare_process() -> None:
    """Sets the environment variables that torch reads at its import: ranks under SLURM, waiting and number of threads.

    Raises `UserError` for a SLURM step that cannot be turned into ranks.
    """
    slurm.fill_in(os.environ)
    let_threads_sleep()
    keep_to_quota()


def keep_to_quota() -> None:
    """Sets OMP_NUM_THREADS, unless it is set, to the cores that a CPU quota allows; torch sees the affinity only."""
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())


def let_threads_sleep() -> None:
    """Lets threads sleep at OpenMP's barriers after some microseconds; call it before torch is imported.

    Threads that spin there starve the decoder's on small machines: with both cores of a 2-core CPU busy, a step of the
    quickstart takes 1.3 to 3.1 s spinning and 0.4 to 0.5 s sleeping. Most waits there are shorter than falling asleep
    takes. 10,000 turns before it give 1.1 to 1.4 times the images/s that 1,000 give where nothing else runs, decoding
    included, and 0.84 times beside a job that takes one of two cores (benchmarks/LOG.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def print_error(error: UserError | str, code: str | None = None) -> int:
    """Prints `fastsiam: SENTENCE [CODE]` to stderr; returns the exit code of a user's mistake, 2.

    `code`: of a plain sentence; an error brings its own.
    """
    code = getattr(error, "code", code)
    print(f"fastsiam: {error}" + (f" [{code}]" if code else ""), file=sys.stderr)
    return int(ExitCode.USER_ERROR)


def refused(error: UserError) -> int:
    """Prints an error that each process of a machine meets on its own, from the first of them; returns 2."""
    return print_error(error) if os.environ.get("LOCAL_RANK", "0") == "0" else int(ExitCode.USER_ERROR)


STEP_TOO_LARGE = (
    "train.batch_size: out of memory, a step does not fit on the CPU of this machine; set train.micro_batch, or a "
    "smaller train.batch_size, views.size, views.count or model.width"
)
BATCH_TOO_LARGE = "--batch-size: out of memory on the CPU of this machine; set a smaller one"
_TOO_LARGE = "out of memory on this machine; end other programs, or use a machine with more memory"


def answered(work: Callable[[], int], *, gone: str, stopped: str, too_large: str = _TOO_LARGE) -> int:
    """Returns the exit code of `work`, or 2 after printing the sentence of a `UserError`.

    `gone`: the sentence where another process of the run has ended (exit code 1); `stopped`: at Ctrl-C (130);
    `too_large`: where the memory of the CPU does not suffice (2).
    """
    try:
        return work()
    except UserError as error:
        return print_error(error)
    except (RuntimeError, MemoryError) as error:
        from fastsiam.runtime.distributed import is_lost_peer

        if _is_short_of_host_memory(error):
            return print_error(too_large, "out-of-host-memory")
        if not is_lost_peer(error):
            raise
        first = str(error).partition(". ")[0].partition("\n")[0]
        print_error(f"{gone} ({first})", "lost-rank")
        return int(ExitCode.ERROR)
    except KeyboardInterrupt:
        print(f"fastsiam: {stopped}", file=sys.stderr)
        return 128 + signal.SIGINT


def _is_short_of_host_memory(error):
    # torch raises a RuntimeError without a type of its own for a tensor that does not fit.
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
