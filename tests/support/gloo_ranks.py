"""Functions run by several gloo processes; the processes are started once for all tests."""

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fastsiam.runtime.distributed import World

SECONDS = 240


class Ranks:
    """`ranks(2, function, *arguments)` calls the function in two processes of one group; their values by rank.

    The function is one of a module, and gets nothing but the arguments: it asks torch.distributed for its rank.
    """

    def __init__(self):
        self._context = multiprocessing.get_context("spawn")
        self._workers: list = []

    def __call__(self, size: int, function: Callable, *arguments) -> list:
        while len(self._workers) < size:
            self._workers.append(self._start())
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers[:size]):
                pipe.send((rank, size, str(Path(folder) / "store"), function, arguments))
            answers = [self._answer(rank, *worker) for rank, worker in enumerate(self._workers[:size])]
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [torch.load(io.BytesIO(value), weights_only=False) for _, value in answers]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()

    def _start(self):
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def _answer(self, rank, process, pipe):
        try:
            if pipe.poll(SECONDS):
                return pipe.recv()
            return False, f"no answer in {SECONDS} s"
        except EOFError:
            process.join()
            return False, f"the process has ended with code {process.exitcode}"


def _serve(pipe):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, store, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            value = io.BytesIO()
            torch.save(function(*arguments), value)
            answer = True, value.getvalue()
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)


def world():
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
