"""Files that only PIL decodes as everybody sees them (CMYK, palettes, transparency, 16 bits), as bitmaps for DALI."""

import io
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

from fastsiam.data.pil import decode_image
from fastsiam.data.sources import ImageSource

# More than the batches in flight ask for together; the oldest are forgotten.
_KEPT = 4096


class Converted:
    """BMP files, which lose nothing, made where they are asked for; at most 4,096 at a time, in a temporary folder."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._folder: Path | None = None
        self._paths: OrderedDict[int, Path] = OrderedDict()

    def bytes(self, index: int) -> bytes:
        """Raises `BadImageError` where PIL cannot decode it."""
        buffer = io.BytesIO()
        decode_image(self._source, index).save(buffer, "BMP")
        return buffer.getvalue()

    def path(self, index: int) -> Path:
        """Raises `BadImageError` where PIL cannot decode it."""
        if index in self._paths:
            self._paths.move_to_end(index)
            return self._paths[index]
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fastsiam-"))
        path = self._folder / f"{index}.bmp"
        path.write_bytes(self.bytes(index))
        self._paths[index] = path
        if len(self._paths) > _KEPT:
            self._paths.popitem(last=False)[1].unlink()
        return path

    def clear(self) -> None:
        """Delete them all."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        self._paths.clear()
