"""What only PIL decodes as everybody sees it (CMYK, palettes, transparency, deep pixels), as bitmaps for DALI."""

import io
import shutil
import tempfile
from collections import deque
from pathlib import Path

from fastsiam.data.decode import decode_image
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError


class Converted:
    """BMP files, which lose nothing, in a temporary folder; they live as long as their batch is under way."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._folder: Path | None = None
        self._batches: deque[list[Path]] = deque()
        self._written = 0

    def begin(self) -> None:
        """What is asked for from now on belongs to another batch."""
        self._batches.append([])

    def finish(self) -> None:
        """Delete the files of the oldest batch."""
        for path in self._batches.popleft():
            path.unlink()

    def bytes(self, index: int) -> bytes:
        """Raises `BadImageError` where PIL cannot decode it."""
        buffer = io.BytesIO()
        decode_image(self._source, index).save(buffer, "BMP")
        return buffer.getvalue()

    def path(self, index: int) -> Path:
        """Raises `BadImageError` where PIL cannot decode it, `UserError` where the file cannot be written."""
        content = self.bytes(index)
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="fastsiam-"))
            path = self._folder / f"{self._written}.bmp"
            self._batches[-1].append(path)
            path.write_bytes(content)
        except OSError as error:
            raise UserError(
                f"{self._source.name(index)} must be converted for DALI, but {tempfile.gettempdir()} cannot be written "
                f"({error}); set TMPDIR to a folder with room, or data.backend=pil",
                "conversion-unwritten",
            ) from error
        self._written += 1
        return path

    def clear(self) -> None:
        """Delete them all."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        self._batches.clear()
