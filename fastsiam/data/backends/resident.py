"""The whole data set in memory, decoded once: crops by one kernel, with no worker and no file after the first start.

An image is stored squashed to a square. A crop's box maps into it linearly, and a crop is resized to a square anyway,
so its geometry is that of a crop of the original; what the original had beyond the store's pixels is lost: views of
160 px out of ImageNet photographs stored at 160 px are 3.8 of 255 off those of the files on average, and nothing is
where images are stored at their own size.
"""

import gc
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import psutil
import torch

from fastsiam.data.backends.base import UndecodableError
from fastsiam.data.backends.decoded_cache import StoreCache, gigabytes
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.kernels import crop_resize

# Of what is free this share is left: model, activations and kNN features come after the stores.
HEAD_ROOM = 0.2
_COPY_BYTES = 256 << 20

# One store for all backends over the same images, gone with the last of them.
_stores: "WeakValueDictionary[tuple[Path, str], Store]" = WeakValueDictionary()


def open_backend(cache: StoreCache, source: ImageSource, sizes: tuple[int, ...], device, say) -> "ResidentBackend":
    """Decodes the images into the cache first, unless an earlier start has; `say` prints a line about it."""
    store = _stores.get((cache.folder, str(device)))
    if store is None:
        store = Store(cache, source, device, say)
        _stores[cache.folder, str(device)] = store
    cache.recall_headers(source)
    return ResidentBackend(sizes, store)


class Store:
    """The images of a source as uint8 [N, S, S, 3] on a device."""

    def __init__(self, cache: StoreCache, source: ImageSource, device: torch.device, say=lambda line: None):
        """Raises `UserError` where it would not fit beside the stores that are there or coming."""
        self.cache, self.device = cache, device
        self._images = None
        check_memory(cache, device)
        cache.decode_once(source, say)
        self.bad = cache.bad()
        """Why some images are not in it, by index."""

    def images(self) -> torch.Tensor:
        """Read from the disk when first asked for."""
        if self._images is None:
            array = self.cache.images()
            self._images = torch.from_numpy(array) if self.device.type == "cpu" else self._upload(array)
        return self._images

    def _upload(self, array):
        images = torch.empty(array.shape, dtype=torch.uint8, device=self.device)
        rows = max(1, _COPY_BYTES // array[0].nbytes)
        for first in range(0, len(array), rows):
            images[first : first + rows].copy_(torch.from_numpy(array[first : first + rows]))
        return images


def check_memory(cache: StoreCache, device: torch.device) -> None:
    """Raises `UserError` where a store would not fit beside the stores that are there or coming."""
    # The store of a run that has ended: its objects refer to each other, and torch keeps what they free.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    others = [store for store in _stores.values() if store.device == device and store._images is None]
    room = int((free_bytes(device) - sum(store.cache.bytes for store in others)) * (1 - HEAD_ROOM))
    if cache.bytes > room:
        largest = int((max(room, 0) / (3 * cache.number)) ** 0.5)
        advice = f"set data.store_size={largest} or less, or" if largest else "set"
        raise UserError(
            f"data.store_size: {cache.number:,} images of {cache.size} px need {gigabytes(cache.bytes)} of "
            f"{device.type} memory, but {gigabytes(max(room, 0))} are available ({HEAD_ROOM:.0%} of free memory is "
            f"reserved for the model); {advice} data.backend=auto",
            "store-too-large",
        )


class ResidentBackend:
    """Crops by `crop_resize` out of a store."""

    def __init__(self, sizes: tuple[int, ...], store: Store):
        self._sizes, self.store = sizes, store
        cache = store.cache
        self.description = (
            f"resident ({cache.number:,} images of {cache.size} px, {gigabytes(cache.bytes)} of {store.device.type} "
            f"memory; decoded by {cache.decoder})"
        )

    def crops(self, requests):
        images = self.store.images()
        for request in requests:
            bad = {index: self.store.bad[index] for index in request.indices.tolist() if index in self.store.bad}
            if bad:
                raise UndecodableError(bad)
            groups = zip(request.boxes, self._sizes, strict=True)
            yield request.indices, [self._crop(images, request, boxes, size) for boxes, size in groups]

    def _crop(self, images, request, boxes, size):
        boxes = boxes_in_store(boxes, request.sizes, self.store.cache.size)
        indices = torch.from_numpy(np.tile(request.indices, len(boxes)))
        return crop_resize(images, torch.from_numpy(boxes).view(-1, 4), size, indices)

    def resize(self, sizes):
        self._sizes = sizes

    def close(self):
        """The store stays, for the other backends and for the next epoch."""


def boxes_in_store(boxes: np.ndarray, sizes: np.ndarray, store_size: int) -> np.ndarray:
    """Boxes [V, N, 4] in pixels of images of `sizes` [N, 2], as fp32 in pixels of their squares of `store_size`."""
    scale = store_size / sizes.astype(np.float64)
    return (boxes * np.concatenate([scale, scale], 1)).astype(np.float32)


def free_bytes(device: torch.device) -> int:
    """Free memory of the CUDA device; without one, bytes available on this machine by the kernel's estimate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
