"""ffcv: images from a .beton, a file mapped into memory that holds them smaller, as JPEG or as pixels.

Reader and JPEG decoder are ffcv's; the loop that decodes an image once and crops all its views is ours. ffcv's loader
wants an epoch's order beforehand, leaves threads behind where an epoch is left early, and sets torch's number of
threads; its memory manager fills dictionaries, for ImageNet's images 660 MB in 4 s, of which reading a mapped file
needs none.
"""

import functools
import itertools
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.metadata import version

import numba
import numpy as np
import torch

from fastsiam.data.backends.base import UndecodableError
from fastsiam.data.backends.cuda_stream import Passed, lane_to
from fastsiam.data.backends.ffcv_imports import IMAGE_MODES, Reader, imdecode
from fastsiam.data.sources.beton import index_path
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.kernels.crop_numba import crop_into
from fastsiam.runtime.cores import threads_for

# Batches decoded ahead of the one in use.
PREFETCH = 2
# A batch is dealt out in so many parts a thread, that none waits long for another with larger images.
_PARTS = 4


def open_backend(source, sizes, batch_size, workers, device) -> "FfcvBackend":
    return FfcvBackend(source, sizes, batch_size, threads_for(workers), device)


_jit = numba.njit(nogil=True, fastmath=True, error_model="numpy")
_decode_jpeg, _JPEG = _jit(imdecode), IMAGE_MODES["jpg"]


@_jit
def _decode_once(indices, crops, boxes, failed, records, storage):
    """Decodes each image once and crops all its views, by the filter of the other backends.

    `crops` uint8 [N, V_g, S_g, 3*S_g] and `boxes` float64 [N, V_g, 4], top, left, height, width in pixels of the stored
    image: one array a group. `failed` int32 [N] becomes other than 0 where a JPEG is damaged. `storage`: the file, and
    addresses and sizes of all that it holds, sorted by address.
    """
    file, addresses, sizes = storage
    for row in range(len(indices)):
        record = records[indices[row]]
        height, width, address = int(record["height"]), int(record["width"]), np.int64(record["data_ptr"])
        image = file[address : address + sizes[np.searchsorted(addresses, address)]]
        failed[row] = 0
        if record["mode"] == _JPEG:
            pixels = np.empty(3 * height * width, np.uint8)
            failed[row] = _decode_jpeg(image, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
            image = pixels
        for group in range(len(crops)):
            for view in range(boxes[group].shape[1]):
                crop_into(image.reshape(height, 3 * width), boxes[group][row, view], crops[group][row, view])


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process: ffcv makes a decoder for each thread that it meets, and frees none."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ffcv")


class FfcvBackend:
    """Decodes images of one .beton by ffcv, and crops them by our kernel.

    ffcv asks libjpeg-turbo for the fast DCT, which on ImageNet photographs is 1.2 levels off PIL's, 0.8 of it darker.
    """

    def __init__(self, source: ImageSource, sizes, batch_size, threads, device: torch.device):
        self._source, self._sizes, self._batch_size = source, sizes, batch_size
        self._threads, self._device = threads, device
        self._records, self._storage = _open(source)
        stored = np.stack((self._records["height"], self._records["width"]), 1)
        self._scale = stored / source.image_sizes
        share = (self._records["mode"] == IMAGE_MODES["jpg"]).mean()
        self.description = (
            f"ffcv {version('ffcv')} ({threads} threads, {share:.0%} JPEG, longest side {stored.max()} px)"
        )
        self._lane, self._slots, self._sent = lane_to(device), None, []

    def crops(self, requests):
        slots = itertools.cycle(range(PREFETCH + 1))
        in_flight = deque()
        try:
            for request in requests:
                in_flight.append(self._start(request, next(slots)))
                if len(in_flight) > PREFETCH:
                    yield self._finish(*in_flight.popleft())
            while in_flight:
                yield self._finish(*in_flight.popleft())
        finally:
            # The next epoch writes to the same memory.
            tasks = [task for *_, tasks in in_flight for task in tasks]
            for task in tasks:
                task.cancel()
            wait(tasks)

    def resize(self, sizes):
        self.close()
        self._sizes = sizes

    def close(self):
        for mark in self._sent:
            mark.synchronize()
        self._slots, self._sent = None, []

    def _allocate(self, request):
        """Makes slots for the crops of batches, one array a group.

        They are pinned for a GPU: from pageable memory the host would wait for all steps before the copy, and the GPU
        then for the host.
        """
        shapes = [
            (PREFETCH + 1, self._batch_size, len(boxes), size, 3 * size)
            for boxes, size in zip(request.boxes, self._sizes, strict=True)
        ]
        pin = self._device.type == "cuda"
        self._slots = [torch.empty(shape, dtype=torch.uint8, pin_memory=pin).numpy() for shape in shapes]
        self._sent = [Passed()] * (PREFETCH + 1)

    def _start(self, request, slot):
        if self._slots is None:
            self._allocate(request)
        # The device may still be copying the slot's last batch.
        self._sent[slot].synchronize()
        indices, failed = np.ascontiguousarray(request.indices, np.int64), np.empty(len(request.indices), np.int32)
        crops = [group[slot][: len(indices)] for group in self._slots]
        # Boxes were drawn for the sizes before shrinking: the same crops as from the originals.
        scale = np.tile(self._scale[indices], 2)[:, None]
        boxes = [group.transpose(1, 0, 2) * scale for group in request.boxes]
        step = math.ceil(len(indices) / (_PARTS * self._threads))
        tasks = []
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            groups = (tuple(array[part] for array in arrays) for arrays in (crops, boxes))
            arguments = indices[part], *groups, failed[part], self._records, self._storage
            tasks.append(_pool(self._threads).submit(_decode_once, *arguments))
        return slot, indices, crops, failed, tasks

    def _finish(self, slot, indices, crops, failed, tasks):
        wait(tasks)
        for task in tasks:
            task.result()
        if failed.any():
            raise UndecodableError(
                {
                    index: f"{self._source.name(index)} cannot be decoded: its JPEG in {self._source.root} is damaged"
                    for index in indices[failed != 0].tolist()
                }
            )
        views, self._sent[slot] = self._lane(lambda: [self._delivered(torch.from_numpy(group)) for group in crops])
        return indices, views

    def _delivered(self, crops):
        """Returns a copy [V*N, S, S, 3] on the device of crops [N, V, S, 3S], whose memory is written to again."""
        size = crops.shape[2]
        return torch.cat(crops.to(self._device, non_blocking=True).unbind(1)).view(-1, size, size, 3)


def _open(source):
    """ffcv's records of the images, and the state of `_read`; raises `UserError` for a file that does not fit."""
    path = source.root
    try:
        reader = Reader(str(path))
    except (OSError, AssertionError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a .beton ({error}); write it again", "beton-unreadable") from error
    table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
    file = np.asarray(np.memmap(path, np.uint8, mode="r"))
    if len({len(source), reader.num_samples, len(reader.metadata), len(table)}) > 1:
        raise UserError(
            f"{path} holds {reader.num_samples} images, {len(table)} of them whole, and {index_path(path).name} names "
            f"{len(source)}; write both again by python -m fastsiam.prepare ffcv",
            "beton-differs",
        )
    records = np.ascontiguousarray(reader.metadata[f"f{reader.field_names.index('image')}"])
    addresses, sizes = (np.ascontiguousarray(table[name]).astype(np.int64) for name in ("ptr", "size"))
    return records, (file, addresses, sizes)
