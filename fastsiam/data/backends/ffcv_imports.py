"""What is used of ffcv, imported so that torch keeps its number of threads; says what to install where it fails."""

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
    from ffcv.pipeline.allocation_query import AllocationQuery, allocate_query
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import INITIAL_STATE
    from ffcv.pipeline.operation import Operation
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter
except ImportError as error:
    raise MissingLibraryError(f"data.backend: ffcv cannot be imported ({error}); {INSTALL}", "no-ffcv") from error
finally:
    # Importing ffcv sets it to 1.
    torch.set_num_threads(_threads)

__all__ = [
    "IMAGE_MODES",
    "INITIAL_STATE",
    "INSTALL",
    "AllocationQuery",
    "Compiler",
    "DatasetWriter",
    "IntField",
    "MemoryAllocator",
    "Operation",
    "RGBImageField",
    "Reader",
    "allocate_query",
    "imdecode",
]
