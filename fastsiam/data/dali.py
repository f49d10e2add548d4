"""NVIDIA DALI: one graph for both devices, each image decoded once and cropped V times.

DALI keeps no random state here: paths, boxes and indices are inputs of the graph. With a GPU: mixed (nvJPEG) decoding
and GPU resizing. Without one DALI decodes only, and `crop_on_cpu` crops: 766 images/s in place of 473 (two 224 px views
of ImageNet photographs, two cores).
"""

import os
from collections import deque

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from fastsiam.data.converted import Converted
from fastsiam.data.headers import ODD, BadImageError
from fastsiam.data.loader import CropRequest
from fastsiam.data.pil import decode_image
from fastsiam.data.skip import UndecodableError
from fastsiam.data.sources import ImageSource
from fastsiam.kernels.crop_numba import crop_on_cpu

# Batches decoded ahead of the one in use.
PREFETCH = 2


def open_backend(source, size, num_views, batch_size, workers, device) -> "DaliBackend":
    return DaliBackend(source, size, num_views, batch_size, workers or os.cpu_count(), device)


@pipeline_def
def crop_graph(source, num_views: int, size: int, decoder: str, packed: bool):
    """[files, indices, boxes of each view] -> [crops uint8 [S, S, 3] of each view, index, shape of the image].

    `decoder`: mixed, for a GPU; cpu runs as well, which is how the graph is tested without one. `packed`: files are
    given as their bytes, otherwise as paths.
    """
    files, indices, *boxes = fn.external_source(
        source, num_outputs=2 + num_views, dtype=[types.UINT8, types.INT64] + [types.FLOAT] * num_views
    )
    images = decode_graph(files, decoder, packed)
    crops = [
        fn.resize(
            images,
            size=(size, size),
            roi_start=box[:2],
            roi_end=box[2:],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        for box in boxes
    ]
    return *crops, indices, images.shape(device="cpu")


@pipeline_def
def image_graph(source, decoder: str, packed: bool):
    """[files, indices] -> [whole images uint8 [H, W, 3], index]."""
    files, indices = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT64])
    return decode_graph(files, decoder, packed), indices


def decode_graph(files, decoder: str, packed: bool):
    encoded = files if packed else fn.io.file.read(files)
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB)


class DaliBackend:
    """DALI decodes; its antialiased linear filter crops on a GPU, ours on the CPU."""

    def __init__(self, source: ImageSource, size, num_views, batch_size, threads, device: torch.device):
        self._source, self._size, self._num_views, self._batch_size = source, size, num_views, batch_size
        self._threads, self._device, self._packed = threads, device, source.packed is not None
        on_gpu = device.type == "cuda"
        self._decoder, self._device_id = ("mixed", device.index or 0) if on_gpu else ("cpu", None)
        self.description = f"dali {dali.__version__} ({self._decoder} decoder, {threads} threads)"
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
                    outputs = self._pipeline.run()
                except StopIteration:
                    break
                except RuntimeError:
                    reasons = self._undecodable()
                    if not reasons:
                        raise
                    raise UndecodableError(reasons) from None
                request = self._in_flight.popleft()
                if self._device.type == "cuda":
                    *views, indices, shapes = outputs
                    sizes = np.array(shapes.as_tensor())[:, :2]
                else:
                    images, indices = outputs
                    images = [images[row] for row in range(len(images))]
                    sizes = np.array([image.shape()[:2] for image in images])
                self._check_sizes(request, sizes)
                crops = self._own(views) if self._device.type == "cuda" else self._crop(images, request)
                yield np.array(indices.as_cpu().as_tensor()).reshape(-1), crops
            self._pipeline.reset()
            finished = True
        finally:
            # A graph left in mid-epoch holds prefetched batches, and one that failed is invalid (NVIDIA/DALI#3913).
            if not finished:
                self.close()

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
        if self._device.type == "cuda":
            pipeline = crop_graph(
                self._next_inputs, self._num_views, self._size, self._decoder, self._packed, **options
            )
        else:
            pipeline = image_graph(self._next_inputs, self._decoder, self._packed, **options)
        pipeline.build()
        return pipeline

    def _next_inputs(self):
        request = next(self._requests)
        self._in_flight.append(request)
        files, reasons = [], {}
        for index in request.indices.tolist():
            try:
                files.append(self._file(index))
            except BadImageError as error:
                reasons[index] = str(error)
        if reasons:
            raise UndecodableError(reasons)
        inputs = files, request.indices.reshape(-1, 1)
        if self._device.type != "cuda":
            return inputs
        boxes = request.boxes.astype(np.float32)
        boxes[..., 2:] += boxes[..., :2]
        return *inputs, *boxes

    def _file(self, index):
        """What the graph decodes, as uint8: path or bytes of the file, or of what PIL made of it."""
        if self._source.kinds[index] == ODD:
            file = self._converted.bytes(index) if self._packed else os.fsencode(self._converted.path(index))
        else:
            file = self._source.read(index) if self._packed else os.fsencode(self._source.path(index))
        return np.frombuffer(file, np.uint8)

    def _crop(self, images, request):
        """Before the next run, in which DALI uses the images' memory again."""
        addresses = np.array([image.data_ptr() for image in images], np.int64)
        return crop_on_cpu(addresses, request.sizes, request.boxes, self._size)

    def _own(self, views):
        """One uint8 tensor [V*N, S, S, 3] of ours: DALI reuses its buffers at the next run."""
        tensors = [torch.from_dlpack(view.as_tensor()) for view in views]
        return torch.cat(tensors).to(self._device)

    def _check_sizes(self, request, sizes):
        """The boxes were drawn for the sizes in the files' headers: another size is another picture."""
        wrong = np.flatnonzero((sizes != request.sizes).any(1))
        if len(wrong):
            raise UndecodableError(
                {
                    int(request.indices[row]): f"{self._source.name(request.indices[row])} decodes to "
                    f"{sizes[row].tolist()} pixels (height, width), but its header says {request.sizes[row].tolist()}"
                    for row in wrong
                }
            )

    def _undecodable(self):
        """Why files in flight cannot be decoded: DALI's error names none, so each is tried alone."""
        reasons = {}
        for index in (index for request in self._in_flight for index in request.indices.tolist()):
            try:
                decode_image(self._source, index)
                self._decode_alone(index)
            except BadImageError as error:
                reasons[index] = str(error)
        return reasons

    def _decode_alone(self, index):
        """Raise `BadImageError` where DALI fails at what PIL decodes."""
        file, number = self._file(index), np.array([index])
        options = {"batch_size": 1, "num_threads": 1, "device_id": self._device_id, "prefetch_queue_depth": 1}
        graph = image_graph(lambda: ([file], [number]), self._decoder, self._packed, **options)
        graph.build()
        try:
            graph.run()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise BadImageError(f"{self._source.name(index)} cannot be decoded by DALI: {reason}") from None
