"""Images in compressed tar shards, for packing only: a run reads shards at random offsets."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from fastsiam.data.sources.image_header import BadImageError
from fastsiam.data.sources.source import ImageSource
from fastsiam.data.sources.tar import DAMAGED, compressed_shards, open_shard, shards_of_folder, source_of_shards
from fastsiam.errors import UserError


@dataclass(frozen=True)
class CompressedSource(ImageSource):
    """Images in compressed shards, read fast in their order; any other order decompresses a shard from its start."""

    _opened: dict = field(default_factory=dict)
    """Path of the last shard, and its decompressed stream."""

    def read(self, index: int) -> bytes:
        path = self.path(index)
        try:
            if path not in self._opened:
                for file in self._opened.values():
                    file.close()
                self._opened.clear()
                self._opened[path] = open_shard(path)
            self._opened[path].seek(self.packed.offset[index])
            return self._opened[path].read(int(self.file_sizes[index]))
        except DAMAGED as error:
            raise BadImageError(f"{self.name(index)} cannot be read: {error}") from error


def open_compressed(location: str, key: str) -> CompressedSource | None:
    """Returns the images of a folder whose tar shards are all compressed; None for anything else.

    Raises `UserError` for zstd, which Python 3.11 cannot read.
    """
    root = Path(location)
    names = compressed_shards(root) if root.is_dir() and not shards_of_folder(root, []) else []
    if not names:
        return None
    unknown = [name for name in names if name.lower().endswith(".zst")]
    if unknown:
        raise UserError(f"{key}: {root / unknown[0]} is compressed by zstd; run unzstd {root}/*.zst first", "zstd")
    source = source_of_shards(root, names, key, open_shard)
    return CompressedSource(**{item.name: getattr(source, item.name) for item in fields(source)})
