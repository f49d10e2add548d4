"""The photos as .betons, and what is in one, read as the format says and not by the backend."""

import numpy as np

from fastsiam.data.sources.open import open_source
from fastsiam.prepare.ffcv import write_beton


def beton_of(photos, stored_as, max_side=4096, quality=95):
    """Source of the photos' .beton, written once for each setting beside their folder; by default none is shrunk."""
    path = photos.with_name(f"{photos.name}-{stored_as}-{max_side}-{quality}.beton")
    if not path.exists():
        write_beton(open_source(str(photos)), path, max_side=max_side, stored_as=stored_as, quality=quality)
    return open_source(str(path))


def stored_images(path):
    """[record, and pixels or bytes of the JPEG] of each image, and the labels."""
    from fastsiam.data.backends.ffcv_imports import Reader

    reader = Reader(str(path))
    sizes = {int(ptr): int(size) for _, ptr, size in reader.alloc_table}
    data, found = path.read_bytes(), []
    for record in reader.metadata["f0"]:
        stored = data[record["data_ptr"] : record["data_ptr"] + sizes[int(record["data_ptr"])]]
        shape = record["height"], record["width"], 3
        found.append((record, np.frombuffer(stored, np.uint8).reshape(shape) if record["mode"] == 1 else stored))
    return found, reader.metadata["f1"]
