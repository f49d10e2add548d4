"""python -m tests.support.kill_at_every_write FOLDER: SIGKILL at each operation of a save, in forks.

For each number of kept checkpoints, and for one kill or two in a row at the same place, a child is killed at operation
0, 1, 2, ... of `save` until a save runs through; the parent then loads. Prints the operations of a whole save for each.
"""

import builtins
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from fastsiam.run.checkpoint import load_newest, path_of, save

COUNTED = ("open", "fsync", "replace", "rename", "link", "unlink", "remove", "truncate", "ftruncate", "close")


class Killer:
    """Counts the operations of a save, and ends the process at the one numbered `fatal`."""

    def __init__(self, fatal: int):
        self.fatal, self.operations = fatal, []

    def at(self, operation: str) -> bool:
        """Returns True where the process dies in this operation."""
        self.operations.append(operation)
        return len(self.operations) - 1 == self.fatal

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        for name in COUNTED:
            setattr(os, name, self._counted(name, getattr(os, name)))
        builtins.open = self._open

    def _counted(self, name, real):
        def operation(*arguments, **more):
            if self.at(name):
                self.die()
            return real(*arguments, **more)

        return operation

    def _open(self, path, mode):
        """A file whose writes are those that reach the system; the fatal one has written half."""
        killer = self

        class Raw(io.FileIO):
            def write(self, data):
                if killer.at("write"):
                    super().write(bytes(data)[: len(data) // 2])
                    killer.die()
                return super().write(data)

        if self.at("open to write"):
            self.die()
        assert mode == "wb"
        return io.BufferedWriter(Raw(path, "w"))


def state(step: int) -> dict:
    """28 kB that a step determines: several writes of a file of 8 kB buffers."""
    return {"step": step, "weight": torch.randn(7000, generator=torch.Generator().manual_seed(step))}


def save_and_die(folder: Path, step: int, keep: int, fatal: int) -> list[str] | None:
    """The operations of a save of a child process, or None where operation `fatal` killed it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        killer = Killer(fatal)
        write, leave = os.write, os._exit
        killer.install()
        save(folder, state(step), keep)
        write(writing, json.dumps(killer.operations).encode())
        leave(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        operations = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0
    return json.loads(operations)


def loaded(folder: Path) -> int:
    """The step of the newest checkpoint, which is no older than any other and bit-equal to what was saved."""
    found = load_newest(folder, warn=lambda sentence: sys.exit(sentence))
    assert torch.equal(found["weight"], state(found["step"])["weight"])
    return found["step"]


def kept(folder: Path) -> list[int]:
    """The steps of all checkpoints, by age."""
    paths = [path_of(folder, age) for age in range(10)]
    return [torch.load(path, weights_only=True)["step"] for path in paths if path.exists()]


def walk(folder: Path, keep: int, kills: int) -> list[str]:
    fatal = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for step in range(1, keep + 1):
            save(folder, state(step), keep)
        newest = keep
        for _ in range(kills):
            operations = save_and_die(folder, newest + 1, keep, fatal)
            if operations is not None:
                assert kept(folder) == list(range(newest + 1, newest + 1 - keep, -1))
                return operations
            where = f"keep {keep}, operation {fatal}: {kept(folder)}"
            assert loaded(folder) in (newest, newest + 1), where
            assert kept(folder)[0] == loaded(folder), where
            newest = loaded(folder)
            # At most one of the kept is out of the way while files move; none is older than it need be.
            assert kept(folder) in ([newest - age for age in range(count)] for count in (keep - 1, keep))
        save(folder, state(newest + 1), keep)
        assert kept(folder) == [newest + 1 - age for age in range(keep)], f"keep {keep}, operation {fatal}"
        assert not (folder / "checkpoint.tmp").exists()
        fatal += 1


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for keep in (1, 2, 3):
        for kills in (1, 2):
            print(json.dumps({"keep": keep, "kills": kills, "operations": walk(root / "run", keep, kills)}))
