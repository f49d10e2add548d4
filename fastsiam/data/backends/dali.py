"""NVIDIA DALI: one graph for both devices decodes each image once, and our kernels crop it V times where it lies.

DALI keeps no random state here: paths and indices are inputs of the graph. With a GPU it decodes there (mixed, nvJPEG).

Its own resize is not Pillow's at the edges of a shrunk crop: what of the filter reaches outside counts as the edge's
pixel again (DALI 2.4, also where the crop is cut out first: up to 17 levels off on noise; with `roi_start` and
`roi_end` it reads the picture around the box, up to 45 on photographs). Pillow gives the weights to the pixels inside,
and so do our kernels. They are faster too. On a CPU: 766 images/s in place of 473 (two 224 px views of ImageNet
photographs, two cores). On an H200, reckoned for 512 such photographs and two views: DALI resizes in two launches with
an fp32 intermediate of 0.8 GB written and read, and torch.cat moves 0.3 GB more; one launch of ours reads the pixels in
the boxes, 0.26 GB, and writes the batch, 0.15 GB.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from fastsiam.data.backends.base import CropRequest, UndecodableError
from fastsiam.data.backends.cuda_stream import Passed, lane_to
from fastsiam.data.backends.dali_convert import Converted
from fastsiam.data.decode import decode_image
from fastsiam.data.sources.image_header import ODD, UNKNOWN, UNREADABLE, BadImageError, other_size
from fastsiam.data.sources.source import ImageSource
from fastsiam.kernels.crop_numba import crop_on_cpu
from fastsiam.kernels.crop_triton import crop_scattered
from fastsiam.runtime.cores import threads_for

# Batches decoded ahead of the one in use.
PREFETCH = 2
# Of a device's memory, for buffers that only the largest image needs.
MEMORY_SHARE = 0.1
# Bytes a pixel of a 4:2:0 JPEG: 16-bit coefficients of 1.5 components in pinned memory; on the device the decoded
# planes beside them. NVIDIA's own sizes for ImageNet, 140,544,512 and 211,025,920, stand in that ratio. The hardware
# decoder's buffers are sized for 4:4:4 (nvImageCodec, hw_decoder.cpp).
PINNED_BYTES, DEVICE_BYTES, HARDWARE_BYTES = 3.0, 4.5, 3.0


class _ConvertedError(Exception):
    """Files that DALI refuses have been left to PIL."""


def open_backend(source, sizes, batch_size, workers, device) -> "DaliBackend":
    return DaliBackend(source, sizes, batch_size, threads_for(workers), device)


def decoder_memory(source: ImageSource, batch_size: int, threads: int, device_bytes: int) -> dict[str, int]:
    """Returns hints of fn.decoders.image: what the mixed decoder allocates at once, in place of growing in mid-epoch.

    They fit the largest image, and are left at DALI's own where some header has not been read yet, or where they would
    take more than a tenth of the device's memory.
    """
    used = source.kinds < UNREADABLE
    if not used.any() or (source.kinds == UNKNOWN).any():
        return {}
    height, width = max(source.image_sizes[used].tolist(), key=lambda size: size[0] * size[1])
    pixels, limit = height * width, MEMORY_SHARE * device_bytes
    hints = {}
    if threads * pixels * DEVICE_BYTES <= limit:
        hints["device_memory_padding"] = int(pixels * DEVICE_BYTES)
        hints["host_memory_padding"] = int(pixels * PINNED_BYTES)
    if batch_size * pixels * HARDWARE_BYTES <= limit:
        hints |= {"preallocate_height_hint": height, "preallocate_width_hint": width}
    return hints


@pipeline_def
def image_graph(source, decoder: str, packed: bool, memory: dict[str, int]):
    """[files, indices] -> [index, whole images uint8 [H, W, 3]].

    `decoder`: mixed, for a GPU, or cpu. `packed`: files are given as their bytes, otherwise as paths. `memory`: of
    `decoder_memory`.
    """
    files, indices = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT64])
    return indices, decode_graph(files, decoder, packed, memory)


def decode_graph(files, decoder: str, packed: bool, memory: dict[str, int]):
    encoded = files if packed else fn.io.file.read(files)
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, **memory)


def _rows_of(paths: list[bytes]) -> np.ndarray:
    """uint8 [N, L]: paths filled up with zeros, behind which DALI does not read.

    As one array 512 of them take 0.6 ms of the thread that runs the graph, as 512 arrays 2.4 ms.
    """
    length = max(map(len, paths)) + 1
    return np.array(paths, f"S{length}").view(np.uint8).reshape(-1, length)


class DaliBackend:
    """Decodes by DALI, and crops by our kernel on the device that DALI decodes on."""

    def __init__(self, source: ImageSource, sizes, batch_size, threads, device: torch.device):
        self._source, self._sizes, self._batch_size = source, sizes, batch_size
        self._threads, self._device, self._packed = threads, device, source.packed is not None
        self._on_gpu = device.type == "cuda"
        self._decoder, self._device_id = ("mixed", device.index or 0) if self._on_gpu else ("cpu", None)
        self.description = f"dali {dali.__version__} ({decoder_text()}, {self._decoder}, {threads} threads)"
        self._pipeline = None
        self._requests = iter(())
        self._in_flight: deque[CropRequest] = deque()
        self._converted = Converted(source)
        self._refusals = _Refusals(source, self._converted, threads, self._decoder, self._device_id)
        self._crop = partial(crop_scattered, device=device) if self._on_gpu else crop_on_cpu
        self._lane, self._cropped = lane_to(device), Passed()
        # DALI writes over outputs that no Python object holds any more, and a GPU may still be reading them.
        self._outputs = None

    def crops(self, requests):
        self._requests = iter(requests)
        finished = False
        try:
            while not finished:
                self._give_back()
                try:
                    delivered = self._next()
                except _ConvertedError:
                    self._rewind()
                    continue
                finished = delivered is None
                if not finished:
                    yield delivered
            self._pipeline.reset()
        finally:
            # A graph left in mid-epoch holds prefetched batches, and one that failed is invalid (NVIDIA/DALI#3913).
            if not finished:
                self.close()

    def resize(self, sizes):
        self._sizes = sizes

    def close(self):
        self._give_back()
        self._pipeline = None
        self._in_flight.clear()
        self._converted.clear()

    def _give_back(self):
        self._cropped.synchronize()
        self._outputs = None

    def _next(self):
        """Returns indices and crops of the oldest batch in flight, or None where there is no more.

        Raises `UndecodableError`, and `_ConvertedError` where the batches in flight are to be asked for again.
        """
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            indices, *self._outputs = self._pipeline.run()
        except StopIteration:
            return None
        except RuntimeError:
            # Before another is built: 400 graphs in a row grew the process by 40 MB where each lived on until
            # the next was there, by 3 MB where it did not.
            self._pipeline = None
            reasons = self._refusals.of_oldest(self._in_flight)
            if not reasons:
                raise
        else:
            request = self._in_flight[0]
            delivered = self._deliver(request, self._outputs)
            self._in_flight.popleft()
            self._converted.finish()
            return np.array(indices.as_cpu().as_tensor()).reshape(-1), delivered
        return self._convert(reasons)

    def _rewind(self):
        """Asks for the batches in flight once more."""
        self._requests = itertools.chain(tuple(self._in_flight), self._requests)
        self.close()

    def _build(self):
        options = {
            "batch_size": self._batch_size,
            "num_threads": self._threads,
            "device_id": self._device_id,
            "prefetch_queue_depth": PREFETCH,
        }
        pipeline = self._graph(self._memory(), options)
        pipeline.build()
        return pipeline

    def _memory(self):
        if not self._on_gpu:
            return {}
        device_bytes = torch.cuda.get_device_properties(self._device).total_memory
        return decoder_memory(self._source, self._batch_size, self._threads, device_bytes)

    def _graph(self, memory, options):
        return image_graph(self._next_inputs, self._decoder, self._packed, memory, **options)

    def _inputs(self, request):
        """Returns what the graph takes beside files and indices."""
        return ()

    def _deliver(self, request, outputs):
        """Returns uint8 crops [V_g*N, S_g, S_g, 3] a group, of the images that the graph has decoded."""
        (images,) = outputs
        self._check_sizes(request, np.array(images.shape())[:, :2])
        addresses = np.array([images[row].data_ptr() for row in range(len(images))], np.int64)
        groups = list(zip(request.boxes, self._sizes, strict=True))
        crops, self._cropped = self._lane(
            lambda: [self._crop(addresses, request.sizes, boxes, size) for boxes, size in groups]
        )
        return crops

    def _next_inputs(self):
        request = next(self._requests)
        self._in_flight.append(request)
        self._converted.begin()
        files = self._files(request.indices)
        return files, request.indices.reshape(-1, 1), *self._inputs(request)

    def _files(self, indices):
        """Returns what the graph decodes, uint8: paths or bytes of the files, or of their conversions by PIL."""
        source, reasons = self._source, {}
        files = [b""] * len(indices) if self._packed else source.paths(indices)
        rows = range(len(indices)) if self._packed else np.flatnonzero(source.kinds[indices] == ODD)
        for row in rows:
            index = int(indices[row])
            try:
                if source.kinds[index] != ODD:
                    files[row] = source.read(index)
                elif self._packed:
                    files[row] = self._converted.bytes(index)
                else:
                    files[row] = os.fsencode(self._converted.path(index))
            except BadImageError as error:
                reasons[index] = str(error)
        if reasons:
            raise UndecodableError(reasons)
        return [np.frombuffer(file, np.uint8) for file in files] if self._packed else _rows_of(files)

    def _check_sizes(self, request, sizes):
        """Leaves images to PIL that have another size than their header says: their boxes were drawn for that."""
        wrong = np.flatnonzero((sizes != request.sizes).any(1))
        if len(wrong):
            self._convert(
                {
                    index: other_size(self._source.name(index), sizes[row], request.sizes[row])
                    for row, index in zip(wrong, request.indices[wrong].tolist(), strict=True)
                }
            )

    def _convert(self, reasons):
        """Leaves files, by index with their fault for DALI, to PIL: raises `_ConvertedError`.

        Raises `UndecodableError` for those that PIL does not decode either, or has converted already.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            refused = zip(reasons, pool.map(self._refused_by_pil, reasons.keys(), reasons.values()), strict=True)
            bad = {index: reason for index, reason in refused if reason}
        self._source.convert(reasons.keys() - bad.keys())
        if bad:
            raise UndecodableError(bad)
        raise _ConvertedError

    def _refused_by_pil(self, index, reason):
        """Returns why an image that DALI refuses for `reason` cannot be used, or None where PIL decodes it."""
        try:
            image = decode_image(self._source, index)
        except BadImageError as error:
            return str(error)
        height, width = self._source.image_sizes[index].tolist()
        return reason if self._source.kinds[index] == ODD or image.size != (width, height) else None


class _Refusals:
    """Finds the files that DALI refuses, whose errors name none: decodes one file at a time in graphs of their own."""

    def __init__(self, source: ImageSource, converted: Converted, threads: int, decoder: str, device_id: int | None):
        self._source, self._converted, self._threads = source, converted, threads
        self._decoder, self._device_id = decoder, device_id

    def of_oldest(self, requests: Iterable[CropRequest]) -> dict[int, str]:
        """Returns sentences by index, for the first of `requests` that holds files which DALI refuses."""
        with ThreadPoolExecutor(self._threads) as pool:
            for request in requests:
                parts = np.array_split(request.indices, min(self._threads, len(request.indices)))
                found = {index: reason for part in pool.map(self._refused_in_turn, parts) for index, reason in part}
                if found:
                    return found
        return {}

    def _refused_in_turn(self, indices):
        """Lists those among `indices` that DALI refuses, and why. A graph that fails is invalid afterwards."""
        refused, indices = [], indices.tolist()
        while indices:
            decoded, reason = self._decode_in_turn(indices)
            if reason is None:
                break
            name = self._source.name(indices[decoded])
            refused.append((indices[decoded], f"{name} cannot be decoded by DALI: {reason}"))
            indices = indices[decoded + 1 :]
        return refused

    def _decode_in_turn(self, indices):
        """Returns how many of `indices` one graph decodes before it fails, and its error."""
        files = (([self._encoded(index)], [np.array([index])]) for index in indices)
        options = {"batch_size": 1, "num_threads": 1, "device_id": self._device_id, "prefetch_queue_depth": 1}
        graph = image_graph(lambda: next(files), self._decoder, True, {}, exec_async=False, **options)
        graph.build()
        for decoded in range(len(indices)):
            try:
                graph.run()
            except RuntimeError as error:
                return decoded, str(error).strip().partition("\n")[0]
        return len(indices), None

    def _encoded(self, index):
        """Returns the bytes that DALI is to decode, as uint8; where they cannot be read, some that it refuses."""
        try:
            odd = self._source.kinds[index] == ODD
            file = self._converted.bytes(index) if odd else self._source.read(index)
        except BadImageError:
            file = b"unreadable"
        return np.frombuffer(file or b"empty", np.uint8)


def decoder_text() -> str:
    """Returns name and version of nvImageCodec, DALI's decoder, which is one package for each CUDA."""
    for name in ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"):
        try:
            return f"nvimgcodec {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "nvimgcodec of unknown version"
