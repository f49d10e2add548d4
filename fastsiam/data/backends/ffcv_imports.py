"""Imports what is used of ffcv: torch keeps its number of threads, and a failure names what to install."""

import torch

from fastsiam.errors import MissingLibraryError

INSTALL = (
    "it is built from source: apt-get install g++ python3-dev pkg-config libopencv-dev libturbojpeg0-dev "
    "(Debian's names) and then pip install ffcv setuptools"
)

_threads = torch.get_num_threads()
try:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter
except ImportError as error:
    raise MissingLibraryError(f"data.backend: ffcv cannot be imported ({error}); {INSTALL}", "no-ffcv") from error
finally:
    # Importing ffcv sets it to 1.
    torch.set_num_threads(_threads)

__all__ = ["IMAGE_MODES", "DatasetWriter", "IntField", "MemoryAllocator", "RGBImageField", "Reader", "imdecode"]
