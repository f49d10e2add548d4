"""Processes of a run as torchrun starts them, and the values they exchange.

Collectives on the host go through gloo, on GPUs through NCCL, in one process group; a run of one process has none.
"""

import contextlib
import datetime
import itertools
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fastsiam.errors import UserError
from fastsiam.runtime import slurm

# Longer than anything that the first rank does alone; a hang is the watchdog's matter.
TIMEOUT = datetime.timedelta(hours=2)
# For all ranks to come together, which is before the watchdog's time.
SETUP = datetime.timedelta(minutes=10)
# What gloo and NCCL say of a connection whose other end has died.
_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|ncclRemoteError"
)

_starts = itertools.count()


@dataclass
class World:
    """The ranks of a run; rank 0 speaks and writes for all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    _store: dist.Store | None = field(default=None, repr=False, compare=False)
    has_own_gpu: bool = field(default=False, compare=False)
    """Each rank of this machine sees one GPU, and each another one, as under srun --gpus-per-task=1."""
    _start: int = field(default=0, repr=False, compare=False)
    """How many groups this process has joined before."""

    @classmethod
    def of_environment(cls) -> "World":
        """The ranks that torchrun or srun has started; this process alone where neither has.

        Raises `UserError` where torchrun's variables are incomplete, and for processes of mpirun.
        """
        slurm.fill_in(os.environ)
        if "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and os.environ["WORLD_SIZE"] != "1":
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start several "
                "processes with torchrun --nproc-per-node N -m fastsiam.train ...",
                "incomplete-torchrun",
            )
        return cls() if missing else cls(*(int(os.environ[name]) for name in names))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def joined(self, asked: str) -> Iterator[None]:
        """The process group of a run with `train.device: asked`, inside the block."""
        self._start = next(_starts)
        if self.size > 1 or under_torchrun():
            self._store, *_ = next(dist.rendezvous("env://", timeout=SETUP))
        if self.size == 1:
            yield
            return
        store = dist.PrefixStore(greeted(self._store, self.rank, self.size), self._store)
        if asked != "cpu":
            self.has_own_gpu = self._finds_own_gpu(store)
        # Fewer devices than processes are an error that the ranks exchange through gloo.
        cuda = asked != "cpu" and (self.has_own_gpu or self.local_size <= torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
            device_id=torch.device("cuda", self.device_rank) if cuda else None,
        )
        yield
        # Not after an error: where a peer has gone, saying goodbye to it can hang.
        dist.destroy_process_group()

    @property
    def device_rank(self) -> int:
        """The number of this rank's GPU among those that it sees."""
        return 0 if self.has_own_gpu else self.local_rank

    @property
    def device_ranks(self) -> int:
        """Number of ranks that need a GPU among those that this one sees."""
        return 1 if self.has_own_gpu else self.local_size

    def _finds_own_gpu(self, store):
        alone = torch.cuda.device_count() == 1
        mine = str(torch.cuda.get_device_properties(0).uuid) if alone else ""
        store.set(f"gpu/{self.rank}", mine)
        everybodys = [store.get(f"gpu/{rank}").decode() for rank in range(self.size)]
        return alone and self.local_size > 1 and everybodys.count(mine) == 1

    def once(self, key: str, value: str) -> str:
        """Returns `value` on the first start of a job, and that same value after every torchrun restart."""
        if self._store is None:
            return value
        key = f"{self._start} {key}"
        if not self._store.check([key]):
            self._store.set(key, value)
        return self._store.get(key).decode()

    def share(self, value: object) -> object:
        """The first rank's value, on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: object) -> list:
        """The values of all ranks in their order, on all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        self.largest(0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all ranks in their order, on all of them; n may differ, the rest may not.

        A rank without rows need not know what the rest is.
        """
        if self.size == 1:
            return rows
        shapes = self.collect(tuple(rows.shape))
        _, *rest = max(shapes, key=lambda shape: shape[0])
        ends = list(itertools.accumulate(shape[0] for shape in shapes))
        everybodys = rows.new_empty(ends[-1], *rest)
        # Each into its place: padded to one length for an all_gather, they would be in memory three times.
        for rank, (end, shape) in enumerate(zip(ends, shapes, strict=True)):
            part = everybodys[end - shape[0] : end]
            if rank == self.rank and len(rows):
                part.copy_(rows)
            if len(part):
                dist.broadcast(part, rank)
        return everybodys

    def share_of(self, count: int) -> slice:
        """This rank's part of `count` things, in the order of ranks; sizes differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def ranks_on_these_cores(self) -> int:
        """Number of ranks that share cores with this one: those of its machine, unless each is bound to its own."""
        everybodys = self.collect((socket.gethostname(), os.sched_getaffinity(0)))
        host, cores = everybodys[self.rank]
        return sum(host == its_host and bool(cores & its_cores) for its_host, its_cores in everybodys)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends all ranks at the end of the block where any of them met a `UserError` inside it.

        The first rank raises it, whoever met it; the others leave in silence with exit code 2.
        """
        mine = None
        try:
            yield
        except UserError as error:
            mine = error
        found = self.collect(mine and UserError(str(mine), mine.code))
        if not any(found):
            return
        if not self.is_first:
            sys.exit(2)
        if mine is not None:
            raise mine
        rank, other = next((rank, error) for rank, error in enumerate(found) if error)
        raise UserError(f"{other} (on rank {rank})", other.code)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The block runs on one rank of each machine first: what it leaves on the disk the others find."""
        if self.local_rank:
            self.barrier()
        try:
            yield
        finally:
            if not self.local_rank:
                self.barrier()


def greeted(store: dist.Store, rank: int, size: int) -> str:
    """A prefix for the store that all ranks of this very start have agreed on. Raises `UserError` where one is missing.

    torchrun's workers share one store over all restarts (torch 2.14), and gloo finds the addresses of killed processes
    in it: 2 of 6 restarts hung. How often its agent has restarted it, each of several machines counts for itself.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + SETUP.total_seconds()
    if rank:
        store.set(f"hello/{rank}", mine)
        prefix = store.get(f"answer/{mine}").decode()
        store.set(f"thanks/{prefix}/{rank}", "")
        return prefix
    waiting = set(range(1, size))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"thanks/{mine}/{other}"]):
                waiting.remove(other)
            elif store.check([f"hello/{other}"]):
                # Of a process that lives or of one that is gone, which will not thank.
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", mine)
        if waiting and time.monotonic() > deadline:
            raise UserError(
                f"rank {min(waiting)} of {size} did not connect within {SETUP}; check that all machines have started",
                "missing-rank",
            )
        time.sleep(0.02)
    return mine


def is_lost_peer(error: BaseException) -> bool:
    """True where a collective failed because another process has gone."""
    kinds = RuntimeError | dist.DistError
    return dist.is_initialized() and isinstance(error, kinds) and _LOST.search(str(error)) is not None


def restarts() -> int:
    """Number of times that torchrun's agent on this machine has restarted its processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
