"""The processes of a run as torchrun starts them: which one this is, and what they agree on.

Collectives on the host go through gloo, on GPUs through NCCL, in one process group; a run of one process has none.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastsiam.config import UserError

# Longer than anything that the first rank does alone; a hang is the watchdog's matter.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The ranks of a run; rank 0 speaks and writes for all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1

    @classmethod
    def of_environment(cls) -> "World":
        """What torchrun says of this process; alone where it says nothing. Raises `UserError` where it says half."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and os.environ["WORLD_SIZE"] != "1":
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start several "
                "processes with torchrun --nproc-per-node N -m fastsiam.train ..."
            )
        return cls() if missing else cls(*(int(os.environ[name]) for name in names))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """The process group of a run on this kind of device, inside the block."""
        if self.size == 1:
            yield
            return
        cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()

    def share(self, value: object) -> object:
        """The first rank's value, on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: object) -> list:
        """Everybody's value in the order of ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, *values: int) -> list[int]:
        """Of each value the largest over all ranks."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def barrier(self) -> None:
        self.largest(0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A `UserError` or `ImportError` that one rank meets inside the block is one on all of them, at its end."""
        mine = None
        try:
            yield
        except (UserError, ImportError) as error:
            mine = error
        found = self.collect(None if mine is None else (type(mine), str(mine)))
        if mine is not None:
            raise mine
        for rank, other in enumerate(found):
            if other is not None:
                kind, sentence = other
                raise kind(f"{sentence} (on rank {rank})")

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


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process has gone."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text.lower() or "Connection closed by peer" in text)
