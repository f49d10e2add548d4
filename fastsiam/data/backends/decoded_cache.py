"""Decoded stores on disk: a folder for each, with the images as one array and what is known of their files."""

import contextlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from fastsiam.data.backends.base import Backend, CropRequest, UndecodableError, check_delivery
from fastsiam.data.sources.image_header import UNKNOWN, UNREADABLE, UNWANTED
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.runtime.cache_dirs import cache_root
from fastsiam.runtime.files import sync_folder

# Images in a batch of the decoding backend.
BATCH = 64
_SECONDS_BETWEEN_LINES = 60


@dataclass(frozen=True)
class StoreCache:
    """A decoded store by what it depends on: names and sizes of the files, side in pixels, decoder.

    Its folder appears whole or not at all.
    """

    number: int
    """N, of images."""
    size: int
    """S, the side in pixels of the squares that images are squashed to."""
    decoder: str
    folder: Path
    backend: Backend
    """Decodes and squashes."""

    @classmethod
    def of(cls, source: ImageSource, size: int, backend: Backend, device: torch.device) -> "StoreCache":
        """Returns the store that `backend` would fill, which decodes one crop of `size` an image, `BATCH` at a time."""
        # Without the number of workers, which changes nothing.
        decoder = f"{backend.description.partition(' (')[0]} on {device.type}"
        name = "-".join((source.fingerprint(), f"{size}px", *decoder.split(" "), *filter(None, [source.levels.tag()])))
        return cls(len(source), size, decoder, cache_root() / "resident" / name, backend)

    @property
    def bytes(self) -> int:
        return self.number * self.size**2 * 3

    def images(self) -> np.ndarray:
        """uint8 [N, S, S, 3], mapped from the disk; rows of `bad` images are black."""
        # Copy on write: torch takes no array that is read-only.
        return np.load(self.folder / "images.npy", mmap_mode="c")

    def bad(self) -> dict[int, str]:
        """Why some images could not be decoded, by index."""
        reasons = json.loads((self.folder / "bad.json").read_text(encoding="utf-8"))
        return {int(index): reason for index, reason in reasons.items()}

    def recall_headers(self, source: ImageSource) -> None:
        """Tell a source the sizes of its images, so that it opens no file."""
        with np.load(self.folder / "headers.npz") as headers:
            known = (source.kinds == UNKNOWN) & (headers["kinds"] < UNREADABLE)
            source.learn(known, headers["sizes"][known], headers["kinds"][known], cache=False)

    def decode_once(self, source: ImageSource, say: Callable[[str], None]) -> None:
        """Fill the folder unless it is there; a process that finds another one at it waits.

        Raises `UserError` where the folder cannot be written.
        """
        # A cache of others may be read-only.
        if self.folder.exists():
            return
        with self._writing():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.folder}.lock").acquire()
        with lock:
            if not self.folder.exists():
                self._decode(source, say)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.backend: resident keeps {gigabytes(self.bytes)} of decoded images under {self.folder.parent}, "
                f"which cannot be written ({error}); set XDG_CACHE_HOME to a folder that can",
                "store-unwritten",
            ) from error

    def _decode(self, source, say):
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        say(
            f"decoding  {self.number:,} images once, to {self.size} px: {gigabytes(self.bytes)} of memory, and as much "
            f"of the disk under {self.folder.parent}"
        )
        began = time.monotonic()
        try:
            with self._writing():
                # What a start that was killed has left.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                images = self._allocate(partial / "images.npy")
            with _without_verdicts(source):
                bad = self._fill(images, source, say)
                headers = {"sizes": source.image_sizes.copy(), "kinds": source.kinds.copy()}
            with self._writing():
                images.flush()
                (partial / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
                np.savez(partial / "headers.npz", **headers)
                for path in partial.iterdir():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(partial)
                partial.rename(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        say(f"decoded   in {time.monotonic() - began:.0f} s; {len(bad)} images are unusable")

    def _allocate(self, path):
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (self.number, self.size, self.size, 3))
        # Now rather than page by page: where the disk is full, writing to a map ends the process with SIGBUS.
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return images

    def _fill(self, images, source, say) -> dict[int, str]:
        everything = np.arange(self.number)
        unreadable = source.look(everything)
        left_out = everything[source.kinds >= UNREADABLE].tolist()
        bad = {index: unreadable.get(index, f"{source.name(index)} cannot be decoded") for index in left_out}
        rest, said = everything[source.kinds < UNREADABLE], time.monotonic()
        while len(rest):
            pending: deque[CropRequest] = deque()
            try:
                for indices, crops in self.backend.crops(_whole_images(source, rest, pending)):
                    check_delivery(pending, indices, crops)
                    images[indices] = crops[0].cpu().numpy()
                    rest = rest[len(indices) :]
                    if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                        said = time.monotonic()
                        say(f"decoding  {self.number - len(rest):,} of {self.number:,} images")
            except UndecodableError as error:
                bad |= error.reasons
                rest = rest[~np.isin(rest, list(error.reasons))]
        self.backend.close()
        # A source says once why a header cannot be read: to the loader that asks for the image.
        source.mark(list(unreadable), UNKNOWN)
        return bad


@contextlib.contextmanager
def _without_verdicts(source):
    """For a while no image is UNWANTED: a store outlives the scan whose verdict that is."""
    unwanted = source.kinds == UNWANTED
    source.mark(unwanted, UNKNOWN)
    try:
        yield
    finally:
        source.mark(unwanted, UNWANTED)


def _whole_images(source, indices, pending):
    for first in range(0, len(indices), BATCH):
        part = indices[first : first + BATCH]
        sizes = source.sizes(part)
        request = CropRequest(part, (np.concatenate([np.zeros_like(sizes), sizes], 1)[None],), sizes)
        pending.append(request)
        yield request


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
