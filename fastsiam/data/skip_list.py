"""Lists of excluded images: those that a scan has found, and those that a run could not decode."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError, printable

_SHOWN = 10


class SkipList:
    """Mask of the excluded images. `found` counts towards the limit; images known before do not."""

    def __init__(
        self,
        num_images: int,
        max_fraction: float,
        known: np.ndarray | None = None,
        report: Callable[[int, str, int], None] = lambda index, reason, count: None,
        location: str = "PATH",
        key: str = "data.max_bad_fraction",
    ):
        """`known`: [N] bool. `report(index, reason, count)` is called for each file found; `count` is their number.

        `location`: of the images, and `key`: of the limit, for messages.
        """
        self.mask = np.zeros(num_images, bool) if known is None else known.copy()
        self.found: dict[int, str] = {}
        self._max_fraction, self._report, self._location, self._key = max_fraction, report, location, key

    def add(self, reasons: dict[int, str]) -> None:
        """Excludes these images from now on; raises `UserError` with the list where they become too many."""
        for index, reason in reasons.items():
            if not self.mask[index]:
                self.mask[index] = True
                self.found[index] = printable(reason)
                self._report(index, self.found[index], len(self.found))
        if len(self.found) > self._max_fraction * len(self.mask):
            names = "\n  ".join(list(self.found.values())[:_SHOWN])
            more = f"\n  and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
            raise UserError(
                f"{len(self.found)} of {len(self.mask):,} images cannot be used, more than {self._key}="
                f"{self._max_fraction:g} allows; python -m fastsiam.prepare scan {self._location} finds them all, "
                f"and later runs exclude them:\n  {names}{more}",
                "too-many-bad-images",
            )
        if self.mask.all():
            raise UserError("none of the images can be decoded", "no-decodable-images")


class SkipFile:
    """The images that a run has excluded, a line each with the reason after a tab: a resumed run begins with them."""

    def __init__(self, path: Path, source: ImageSource):
        self._path, self._source = path, source

    def known(self) -> np.ndarray:
        """[N] bool: named in the file, or known to the source as not to be used."""
        known = self._source.kinds >= UNREADABLE
        if self._path.exists():
            lines = self._path.read_bytes().splitlines()
            known |= np.isin(self._source.names, [line.partition(b"\t")[0] for line in lines])
        return known

    def add(self, index: int, reason: str) -> None:
        """Raises `OSError` where the disk refuses."""
        line = bytes(self._source.names[index]) + b"\t" + reason.replace("\n", " ").encode() + b"\n"
        with open(self._path, "ab") as file:
            file.write(line)
