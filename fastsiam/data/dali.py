"""NVIDIA DALI: one graph for both devices, each image decoded once and cropped V times.

DALI keeps no random state here: paths, boxes and indices are inputs of the graph. With a GPU: mixed (nvJPEG) decoding
and GPU resizing. Without one DALI decodes only, and `crop_on_cpu` crops: 766 images/s in place of 473 (two 224 px views
of ImageNet photographs, two cores).
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from fastsiam.cores import threads_for
from fastsiam.data.converted import Converted
from fastsiam.data.headers import ODD, UNKNOWN, UNREADABLE, BadImageError, other_size
from fastsiam.data.loader import CropRequest
from fastsiam.data.pil import decode_image
from fastsiam.data.skip import UndecodableError
from fastsiam.data.sources import ImageSource
from fastsiam.kernels.crop_numba import crop_on_cpu

# Batches decoded ahead of the one in use.
PREFETCH = 2
# Of a device's memory, for buffers that only the largest image needs.
MEMORY_SHARE = 0.1
# Bytes a pixel of a 4:2:0 JPEG: 16-bit coefficients of 1.5 components in pinned memory; on the device the decoded
# planes beside them. NVIDIA's own sizes for ImageNet, 140,544,512 and 211,025,920, stand in that ratio. The hardware
# decoder's buffers are sized for 4:4:4 (nvImageCodec, hw_decoder.cpp).
PINNED_BYTES, DEVICE_BYTES, HARDWARE_BYTES = 3.0, 4.5, 3.0


def open_backend(source, size, num_views, batch_size, workers, device) -> "DaliBackend":
    return DaliBackend(source, size, num_views, batch_size, threads_for(workers), device)


def decoder_memory(source: ImageSource, batch_size: int, threads: int, device_bytes: int) -> dict[str, int]:
    """Hints of fn.decoders.image: what the mixed decoder allocates at once, in place of growing in mid-epoch.

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
def crop_graph(source, num_views: int, size: int, decoder: str, packed: bool, memory: dict[str, int]):
    """[files, indices, boxes of each view] -> [index, shape of the image, crops uint8 [S, S, 3] of each view].

    `decoder`: mixed, for a GPU; cpu runs as well, which is how the graph is tested without one. `packed`: files are
    given as their bytes, otherwise as paths. `memory`: of `decoder_memory`.
    """
    files, indices, *boxes = fn.external_source(
        source, num_outputs=2 + num_views, dtype=[types.UINT8, types.INT64] + [types.FLOAT] * num_views
    )
    images = decode_graph(files, decoder, packed, memory)
    return indices, images.shape(device="cpu"), *(resized(images, box, size) for box in boxes)


@pipeline_def
def image_graph(source, decoder: str, packed: bool):
    """[files, indices] -> [index, whole images uint8 [H, W, 3]]."""
    files, indices = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT64])
    return indices, decode_graph(files, decoder, packed, {})


def decode_graph(files, decoder: str, packed: bool, memory: dict[str, int]):
    encoded = files if packed else fn.io.file.read(files)
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, **memory)


def resized(images, box, size: int):
    """`box`: float [4], top, left, bottom, right in pixels."""
    return fn.resize(
        images,
        size=(size, size),
        roi_start=box[:2],
        roi_end=box[2:],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


class DaliBackend:
    """DALI decodes; its antialiased linear filter crops on a GPU, ours on the CPU."""

    def __init__(self, source: ImageSource, size, num_views, batch_size, threads, device: torch.device):
        self._source, self._size, self._num_views, self._batch_size = source, size, num_views, batch_size
        self._threads, self._device, self._packed = threads, device, source.packed is not None
        self._on_gpu = device.type == "cuda"
        self._decoder, self._device_id = ("mixed", device.index or 0) if self._on_gpu else ("cpu", None)
        self.description = f"dali {dali.__version__} ({decoder_text()}, {self._decoder}, {threads} threads)"
        self._pipeline = None
        self._requests = iter(())
        self._in_flight: deque[CropRequest] = deque()
        self._converted = Converted(source)

    def crops(self, requests):
        if self._pipeline is None:
            self._pipeline = self._build()
        self._requests = iter(requests)
        finished = False
        try:
            while True:
                try:
                    indices, *outputs = self._pipeline.run()
                except StopIteration:
                    break
                except RuntimeError:
                    # Before another is built: 400 graphs in a row grew the process by 40 MB where each lived on until
                    # the next was there, by 3 MB where it did not.
                    self._pipeline = None
                    reasons = self._undecodable()
                    if not reasons:
                        raise
                    raise UndecodableError(reasons) from None
                self._converted.finish()
                delivered = self._deliver(self._in_flight.popleft(), outputs)
                yield np.array(indices.as_cpu().as_tensor()).reshape(-1), delivered
            self._pipeline.reset()
            finished = True
        finally:
            # A graph left in mid-epoch holds prefetched batches, and one that failed is invalid (NVIDIA/DALI#3913).
            if not finished:
                self.close()

    def resize(self, size):
        self.close()
        self._size = size

    def close(self):
        self._pipeline = None
        self._in_flight.clear()
        self._converted.clear()

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
        if not self._on_gpu:
            return image_graph(self._next_inputs, self._decoder, self._packed, **options)
        return crop_graph(
            self._next_inputs, self._num_views, self._size, self._decoder, self._packed, memory, **options
        )

    def _inputs(self, request):
        """What the graph takes beside files and indices."""
        return corners(request.boxes) if self._on_gpu else ()

    def _deliver(self, request, outputs):
        """uint8 crops [V*N, S, S, 3] of what the graph has made; its memory is used again at the next run."""
        if self._on_gpu:
            return self._own(request, outputs)
        (images,) = outputs
        images = [images[row] for row in range(len(images))]
        self._check_sizes(request, np.array([image.shape()[:2] for image in images]))
        addresses = np.array([image.data_ptr() for image in images], np.int64)
        return crop_on_cpu(addresses, request.sizes, request.boxes, self._size)

    def _next_inputs(self):
        request = next(self._requests)
        self._in_flight.append(request)
        self._converted.begin()
        files, reasons = [], {}
        for index in request.indices.tolist():
            try:
                files.append(self._file(index))
            except BadImageError as error:
                reasons[index] = str(error)
        if reasons:
            raise UndecodableError(reasons)
        return files, request.indices.reshape(-1, 1), *self._inputs(request)

    def _file(self, index):
        """What the graph decodes, as uint8: path or bytes of the file, or of what PIL made of it."""
        if self._source.kinds[index] == ODD:
            file = self._converted.bytes(index) if self._packed else os.fsencode(self._converted.path(index))
        else:
            file = self._source.read(index) if self._packed else os.fsencode(self._source.path(index))
        return np.frombuffer(file, np.uint8)

    def _own(self, request, outputs):
        """What the graph made of each view as one tensor [V*N, S, S, 3] of ours."""
        shapes, *views = outputs
        self._check_sizes(request, np.array(shapes.as_tensor())[:, :2])
        return torch.cat([torch.from_dlpack(view.as_tensor()) for view in views]).to(self._device)

    def _check_sizes(self, request, sizes):
        """The boxes were drawn for the sizes in the files' headers: another size is another picture."""
        wrong = np.flatnonzero((sizes != request.sizes).any(1))
        if len(wrong):
            raise UndecodableError(
                {
                    index: other_size(self._source.name(index), sizes[row], request.sizes[row])
                    for row, index in zip(wrong, request.indices[wrong].tolist(), strict=True)
                }
            )

    def _undecodable(self):
        """Why files in flight cannot be decoded: DALI's error names none, so each is tried alone, by PIL first."""
        batches = [request.indices.tolist() for request in self._in_flight]
        with ThreadPoolExecutor(self._threads) as pool:
            for indices in batches:
                refused = zip(indices, pool.map(self._refused_by_pil, indices), strict=True)
                if reasons := {index: reason for index, reason in refused if reason}:
                    return reasons
        return self._refused_by_dali([index for indices in batches for index in indices])

    def _refused_by_pil(self, index):
        try:
            decode_image(self._source, index)
        except BadImageError as error:
            return str(error)
        return None

    def _refused_by_dali(self, indices):
        """Sentences for those that PIL decodes and DALI does not, by index."""
        reasons = {}
        while indices:
            decoded, reason = self._decode_in_turn(indices)
            if reason is None:
                break
            name = self._source.name(indices[decoded])
            reasons[indices[decoded]] = f"{name} cannot be decoded by DALI: {reason}"
            indices = indices[decoded + 1 :]
        return reasons

    def _decode_in_turn(self, indices):
        """How many of `indices` one graph decodes before it fails, and what it says then; it is invalid afterwards."""
        files = (([self._file(index)], [np.array([index])]) for index in indices)
        options = {"batch_size": 1, "num_threads": 1, "device_id": self._device_id, "prefetch_queue_depth": 1}
        graph = image_graph(lambda: next(files), self._decoder, self._packed, exec_async=False, **options)
        graph.build()
        for decoded in range(len(indices)):
            try:
                graph.run()
            except RuntimeError as error:
                return decoded, str(error).strip().partition("\n")[0]
        return len(indices), None


def corners(boxes: np.ndarray) -> np.ndarray:
    """Top, left, height, width [..., 4] as float32 top, left, bottom, right."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1).astype(np.float32)


def decoder_text() -> str:
    """nvImageCodec, which decodes for DALI, with its version; it comes as a package of its own for each CUDA."""
    for name in ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"):
        try:
            return f"nvimgcodec {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "nvimgcodec of unknown version"
