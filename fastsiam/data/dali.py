"""NVIDIA DALI: one graph for both devices, each image decoded once and cropped V times.

DALI keeps no random state here: paths, boxes and indices are inputs of the graph. CPU operators without a GPU,
mixed (nvJPEG) decoding and GPU resizing with one.
"""

import os
from collections import deque

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from fastsiam.data.pil import decode
from fastsiam.data.sources import ImageSource

# Batches decoded ahead of the one in use.
PREFETCH = 2


def open_backend(source, size, num_views, batch_size, workers, device) -> "DaliBackend":
    return DaliBackend(source, size, num_views, batch_size, workers or os.cpu_count(), device)


@pipeline_def
def crop_graph(source, num_views: int, size: int, decoder: str):
    """[paths, indices, boxes of each view] -> [crops uint8 [S, S, 3] of each view, index]."""
    paths, indices, *boxes = fn.external_source(
        source, num_outputs=2 + num_views, dtype=[types.UINT8, types.INT64] + [types.FLOAT] * num_views
    )
    images = fn.decoders.image(fn.io.file.read(paths), device=decoder, output_type=types.RGB)
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
    return *crops, indices


class DaliBackend:
    """DALI's antialiased linear filter on its own decoder's pixels."""

    def __init__(self, source: ImageSource, size, num_views, batch_size, threads, device: torch.device):
        self._source, self._size, self._num_views, self._batch_size = source, size, num_views, batch_size
        self._threads, self._device = threads, device
        self._decoder = "mixed" if device.type == "cuda" else "cpu"
        self.description = f"dali {dali.__version__} ({self._decoder} decoder, {threads} threads)"
        self._pipeline = None
        self._requests = iter(())
        self._in_flight: deque[np.ndarray] = deque()

    def crops(self, requests):
        if self._pipeline is None:
            self._pipeline = self._build()
        self._requests = iter(requests)
        finished = False
        try:
            while True:
                try:
                    *views, indices = self._pipeline.run()
                except StopIteration:
                    break
                except RuntimeError as error:
                    self._name_bad_file(error)
                    raise
                self._in_flight.popleft()
                yield np.array(indices.as_cpu().as_tensor()).reshape(-1), self._own(views)
            self._pipeline.reset()
            finished = True
        finally:
            # A graph left in mid-epoch holds prefetched batches, and one that failed is invalid (NVIDIA/DALI#3913).
            if not finished:
                self.close()

    def close(self):
        self._pipeline = None
        self._in_flight.clear()

    def _build(self):
        pipeline = crop_graph(
            self._next_inputs,
            self._num_views,
            self._size,
            self._decoder,
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device.index or 0 if self._device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH,
        )
        pipeline.build()
        return pipeline

    def _next_inputs(self):
        request = next(self._requests)
        self._in_flight.append(request.indices)
        paths = [np.frombuffer(os.fsencode(self._source.path(i)), np.uint8) for i in request.indices]
        boxes = request.boxes.astype(np.float32)
        boxes[..., 2:] += boxes[..., :2]
        return paths, request.indices.reshape(-1, 1), *boxes

    def _own(self, views):
        """One uint8 tensor [V*N, S, S, 3] of ours: DALI reuses its buffers at the next run."""
        tensors = [torch.from_dlpack(view.as_tensor()) for view in views]
        return torch.cat(tensors).to(self._device)

    def _name_bad_file(self, error):
        """DALI's error names no file: decode what was in flight with PIL, which raises for the first bad one."""
        for indices in self._in_flight:
            for index in indices:
                decode(self._source.path(index))
