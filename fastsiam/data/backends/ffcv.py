"""ffcv: images from a .beton, a file mapped into memory that holds them smaller, as JPEG or as pixels.

`DecodeOnce` is an operation of ffcv's, compiled by its compiler: it decodes an image once and makes all its crops. What
runs it is ours. ffcv's loader wants an epoch's order beforehand, leaves threads behind where an epoch is left early,
and sets torch's number of threads; its memory manager fills dictionaries, for ImageNet's images 660 MB in 4 s, of which
reading a mapped file needs none.
"""

import functools
import itertools
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from importlib.metadata import version

import numba
import numpy as np
import torch

from fastsiam.data.backends.base import UndecodableError
from fastsiam.data.backends.cuda_stream import Passed, lane_to
from fastsiam.data.backends.ffcv_imports import (
    IMAGE_MODES,
    INITIAL_STATE,
    AllocationQuery,
    Compiler,
    Operation,
    Reader,
    allocate_query,
    imdecode,
)
from fastsiam.data.sources.beton import index_path
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.kernels.crop_numba import crop_into
from fastsiam.runtime.cores import threads_for

# Batches decoded ahead of the one in use.
PREFETCH = 2
# A batch is dealt out in so many parts a thread, that none waits long for another with larger images.
_PARTS = 4


def open_backend(source, size, num_views, batch_size, workers, device) -> "FfcvBackend":
    return FfcvBackend(source, size, num_views, batch_size, threads_for(workers), device)


class DecodeOnce(Operation):
    """Decodes each image once and crops it V times, by the filter of the other backends.

    Its memory: crops uint8 [N, V, S, 3S], boxes float64 [N, V, 4] (top, left, height, width in pixels of the stored
    image), and int32 [N], which is not 0 where a JPEG is damaged.
    """

    def __init__(self, num_views: int, size: int):
        super().__init__()
        self._num_views, self._size = num_views, size

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self._num_views, self._size, 3 * self._size), np.dtype(np.uint8)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), (
            AllocationQuery(shape, dtype),
            AllocationQuery((self._num_views, 4), np.dtype(np.float64)),
            AllocationQuery((), np.dtype(np.int32)),
        )

    def generate_code(self):
        read, decode, jpeg = self.memory_read, Compiler.compile(imdecode), IMAGE_MODES["jpg"]

        def decode_once(batch_indices, memory, metadata, storage_state):
            crops, boxes, failed = memory
            for row in range(len(batch_indices)):
                field = metadata[batch_indices[row]]
                height, width = int(field["height"]), int(field["width"])
                image = read(field["data_ptr"], storage_state)
                failed[row] = 0
                if field["mode"] == jpeg:
                    pixels = np.empty(3 * height * width, np.uint8)
                    failed[row] = decode(image, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    image = pixels
                for view in range(boxes.shape[1]):
                    crop_into(image.reshape(height, 3 * width), boxes[row, view], crops[row, view])
            return crops

        return decode_once


@numba.njit(nogil=True)
def _read(address, state):
    """The bytes stored at an address; `state`: the file, and addresses and sizes of all that it holds, sorted."""
    file, addresses, sizes = state
    address = np.int64(address)
    return file[address : address + sizes[np.searchsorted(addresses, address)]]


@functools.cache
def _compiled():
    """One for all backends: the numbers of views and pixels are in the shapes, and compiling takes seconds."""
    operation = DecodeOnce(0, 0)
    operation.accept_globals(None, _read)
    return Compiler.compile(operation.generate_code())


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept while the process lives: ffcv makes a decoder for each thread that it meets, and never frees it."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ffcv")


class FfcvBackend:
    """Images of one .beton, cropped by our kernel from what ffcv decodes.

    It asks libjpeg-turbo for the fast DCT, which on ImageNet photographs is 1.2 levels off PIL's, 0.8 of it darker.
    """

    def __init__(self, source: ImageSource, size, num_views, batch_size, threads, device: torch.device):
        self._source, self._size, self._num_views, self._batch_size = source, size, num_views, batch_size
        self._threads, self._device = threads, device
        self._records, self._storage = _open(source)
        stored = np.stack((self._records["height"], self._records["width"]), 1)
        self._scale = stored / source.image_sizes
        share = (self._records["mode"] == IMAGE_MODES["jpg"]).mean()
        self.description = (
            f"ffcv {version('ffcv')} ({threads} threads, {share:.0%} JPEG, longest side {stored.max()} px)"
        )
        self._lane, self._memory, self._sent = lane_to(device), None, []

    def crops(self, requests):
        if self._memory is None:
            self._allocate()
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

    def resize(self, size):
        self.close()
        self._size = size

    def close(self):
        for mark in self._sent:
            mark.synchronize()
        self._memory, self._sent = None, []

    def _allocate(self):
        """Slots for batches, in parts as `DecodeOnce` has them.

        The crops are pinned for a GPU: from pageable memory the host would wait for all steps before the copy, and the
        GPU then for the host.
        """
        _, queries = DecodeOnce(self._num_views, self._size).declare_state_and_memory(INITIAL_STATE)
        slots = PREFETCH + 1
        shape = (slots, self._batch_size, *queries[0].shape)
        crops = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda").numpy()
        self._memory = [crops, *(allocate_query(query, self._batch_size, slots) for query in queries[1:])]
        self._sent = [Passed()] * slots

    def _start(self, request, slot):
        # The device may still be copying the slot's last batch.
        self._sent[slot].synchronize()
        indices = np.ascontiguousarray(request.indices, np.int64)
        memory = tuple(part[slot][: len(indices)] for part in self._memory)
        # Boxes were drawn for the sizes before shrinking: the same crops as from the originals.
        memory[1][:] = request.boxes.transpose(1, 0, 2) * np.tile(self._scale[indices], 2)[:, None]
        step = math.ceil(len(indices) / (_PARTS * self._threads))
        rows = [slice(start, start + step) for start in range(0, len(indices), step)]
        pool, run = _pool(self._threads), _compiled()
        tasks = [
            pool.submit(run, indices[part], tuple(array[part] for array in memory), self._records, self._storage)
            for part in rows
        ]
        return slot, indices, memory, tasks

    def _finish(self, slot, indices, memory, tasks):
        wait(tasks)
        for task in tasks:
            task.result()
        crops, _, failed = memory
        if failed.any():
            raise UndecodableError(
                {
                    index: f"{self._source.name(index)} cannot be decoded: its JPEG in {self._source.root} is damaged"
                    for index in indices[failed != 0].tolist()
                }
            )
        here, device = torch.from_numpy(crops), self._device
        # A copy, also of a single view: the memory is written to again.
        views, self._sent[slot] = self._lane(lambda: torch.cat(here.to(device, non_blocking=True).unbind(1)))
        return indices, views.view(-1, self._size, self._size, 3)


def _open(source):
    """ffcv's records of the images, and the state of `_read`; raises `UserError` for a file that does not fit."""
    path = source.root
    try:
        reader = Reader(str(path))
    except (OSError, AssertionError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a .beton ({error}); write it anew") from error
    table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
    file = np.asarray(np.memmap(path, np.uint8, mode="r"))
    if len({len(source), reader.num_samples, len(reader.metadata), len(table)}) > 1:
        raise UserError(
            f"{path} holds {reader.num_samples} images, {len(table)} of them whole, and {index_path(path).name} names "
            f"{len(source)}; write both anew by python -m fastsiam.prepare ffcv"
        )
    records = np.ascontiguousarray(reader.metadata[f"f{reader.field_names.index('image')}"])
    addresses, sizes = (np.ascontiguousarray(table[name]).astype(np.int64) for name in ("ptr", "size"))
    return records, (file, addresses, sizes)
