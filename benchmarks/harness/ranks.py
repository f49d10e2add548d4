"""Processes of a benchmark of several ranks: they start and end together, and the first one chooses what runs next."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.multiprocessing

from benchmarks.harness.timing import Samples, interleave
from fastsiam.runtime.distributed import World


def in_ranks(size: int, device: str, function: Callable, *arguments):
    """Calls `function(world, *arguments)` in `size` new processes; returns the first one's value.

    `device`: `train.device` of their config. The processes share the CPU's cores evenly. A process that fails ends the
    others and raises `torch.multiprocessing.ProcessException` here; all of them end with this process.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        value = Path(folder) / "value"
        torch.multiprocessing.spawn(_serve, (size, port, device, value, function, arguments), size, daemon=True)
        return pickle.loads(value.read_bytes())


def threads_of_each(size: int) -> int:
    """Returns the number of CPU threads of each of `size` processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // size)


def _serve(rank, size, port, device, value, function, arguments):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Without it gloo looks up the machine's name, which some networks answer with an unreachable address.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(threads_of_each(size))
    world = World.of_environment()
    with world.joined(device):
        returned = function(world, *arguments)
        if world.is_first:
            value.write_bytes(pickle.dumps(returned))


def in_turns(
    world: World, device: torch.device, functions: Mapping[str, Callable[[int], object]], *, together: int, **options
) -> dict[str, Samples] | None:
    """Times functions that all ranks call at the same time; returns samples on the first rank, None elsewhere.

    All ranks pass the same names and `together`. The first rank decides what runs next and when to stop. A sample
    begins when it tells the others, and ends when the slowest rank's device has finished `together` calls; it holds one
    broadcast and one barrier of the host, 0.3 ms over gloo on one machine. `options` are those of `interleave`.
    """

    def turn(name, number):
        for index in range(number * together, (number + 1) * together):
            functions[name](index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        world.barrier()

    def ask(name, number):
        world.share((name, number))
        turn(name, number)

    if not world.is_first:
        while (asked := world.share(None)) is not None:
            turn(*asked)
        return None
    asking = {name: lambda number, name=name: ask(name, number) for name in functions}
    taken = interleave(asking, device=device, hide_enqueue=False, **options)
    world.share(None)
    return {name: Samples(tuple(second / together for second in samples.seconds)) for name, samples in taken.items()}
