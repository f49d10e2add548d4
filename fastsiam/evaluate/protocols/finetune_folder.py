"""Folder of one fine-tuning: its lock, its checkpoint, and the terms on which it goes on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.result import written
from fastsiam.run import checkpoint

LAYOUT = 1
# Terms that are hashes: another one is not worth printing.
_HASHED = {
    "ENCODER": "its weights are not those",
    "--train": "its images are not those",
    "--val": "its images are not those",
    "--labels": "its images are not those",
}


class FinetuneFolder:
    """Written by the first rank alone."""

    def __init__(self, path: Path, terms: dict):
        """`terms`: what must be the same at each start, by option."""
        self.path, self.list_path, self.terms = path, path / "labels.tsv", terms

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The folder is made, and locked inside the block. Raises `UserError` where another process has it."""
        lock = FileLock(self.path / "lock")
        with written(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                text = f"--out: another process is fine-tuning in {self.path}; wait for it, or give another folder"
                raise UserError(text, "folder-in-use") from None
        try:
            yield
        finally:
            lock.release()

    def saved(self, fresh: bool) -> dict | None:
        """The checkpoint of an earlier start; None for none, and where the user starts over, which removes it.

        Raises `UserError` for one that is damaged, and where this start has other terms.
        """
        path = checkpoint.path_of(self.path, 0)
        if fresh:
            with written(path):
                path.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            found = checkpoint.load(path)
        except UserError as error:
            raise UserError(f"{error}; --fresh starts over", error.code) from error
        if not isinstance(found, dict) or found.get("layout") != LAYOUT or "terms" not in found:
            raise UserError(f"{path} is of another program or version; --fresh starts over", "other-version")
        self._check(found["terms"])
        return found

    def _check(self, then):
        for key, now in self.terms.items():
            before = then.get(key)
            if before == now:
                continue
            if key in _HASHED:
                text = f"{key}: {_HASHED[key]} with which {self.path} was begun; --fresh starts over"
                raise UserError(text, "other-data" if key != "ENCODER" else "other-encoder")
            again = f"{key} {before:g}" if isinstance(before, float) else f"{key} {before}"
            if isinstance(before, bool):
                again = key if before else key.replace("--", "--no-", 1)
            text = f"{key}: {self.path} was begun with {again}; give that to go on, or --fresh to start over"
            raise UserError(text, "changed-option")

    def save(self, contents: dict) -> None:
        """Writes the checkpoint whole or not at all; raises `UserError` where the disk refuses."""
        checkpoint.save(self.path, {"layout": LAYOUT, "terms": self.terms, **contents}, keep=1)
