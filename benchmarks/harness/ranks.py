"""The processes of a distributed benchmark: started together, ended together, told by the first what comes next."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
from collections.abc import Callable, Mapping

import torch

from benchmarks.harness.timing import Samples, interleave
from fastsiam.runtime.device import choose_device
from fastsiam.runtime.distributed import World


def in_ranks(size: int, device: str, function: Callable, *arguments):
    """`function(world, device, *arguments)` in `size` new processes of this machine; the first one's value.

    `device`: cpu or cuda, one GPU for each process. CPU threads are shared out evenly. Raises `RuntimeError` naming
    rank and exit code where a process fails, whose traceback is on stderr then; the others are ended with it.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    port = _free_port()
    processes = []
    for rank in range(size):
        pipe = there if rank == 0 else None
        arguments_there = (rank, size, port, device, pipe, function, arguments)
        processes.append(context.Process(target=_serve, args=arguments_there, daemon=True))
    try:
        for process in processes:
            process.start()
        # Open in the first rank only, so that its end is seen here.
        there.close()
        value = _value_of_first(here, processes)
        for rank, process in enumerate(processes):
            process.join()
            _check(rank, process)
        return value
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def threads_of_each(size: int) -> int:
    """CPU threads of each of `size` processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // size)


def _value_of_first(pipe, processes):
    running = {process.sentinel: (rank, process) for rank, process in enumerate(processes)}
    while True:
        for ready in multiprocessing.connection.wait([pipe, *running]):
            if ready is pipe:
                try:
                    return pipe.recv()
                except EOFError:
                    processes[0].join()
                    _check(0, processes[0])
                    raise RuntimeError("rank 0 has ended without a value") from None
            rank, process = running.pop(ready)
            process.join()
            _check(rank, process)


def _check(rank, process):
    if process.exitcode:
        raise RuntimeError(f"rank {rank} has ended with code {process.exitcode}")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank, size, port, device, pipe, function, arguments):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Else it looks the machine's name up, which some networks answer with an address that leads nowhere.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads_of_each(size))
    world = World.of_environment()
    chosen = choose_device(device, world.local_rank, world.local_size)
    with world.joined(chosen):
        value = function(world, chosen, *arguments)
        if pipe is not None:
            pipe.send(value)


def _end_with_parent():
    """A parent that is killed ends nobody: its ranks would go on beside the next benchmark."""
    multiprocessing.parent_process().join()
    os._exit(1)


def in_turns(
    world: World, device: torch.device, functions: Mapping[str, Callable[[int], object]], *, together: int, **options
) -> dict[str, Samples] | None:
    """`interleave` over functions that all ranks call at the same time; samples on the first rank, None elsewhere.

    All ranks pass the same names and `together`. The first one decides what runs next and when it is enough. A sample
    begins when it tells the others, and ends when the slowest rank's device has done `together` calls; so it holds one
    broadcast and one barrier of the host, together 0.3 ms over gloo on one machine. `options` are `interleave`'s.
    """

    def turn(name, number):
        for index in range(number * together, (number + 1) * together):
            functions[name](index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        world.barrier()

    def told(name):
        def call(number):
            world.share((name, number))
            turn(name, number)

        return call

    if not world.is_first:
        while (asked := world.share(None)) is not None:
            turn(*asked)
        return None
    taken = interleave({name: told(name) for name in functions}, device=device, hide_enqueue=False, **options)
    world.share(None)
    return {name: Samples(tuple(second / together for second in samples.seconds)) for name, samples in taken.items()}
