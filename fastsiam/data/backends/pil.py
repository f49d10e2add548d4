"""PIL decodes, torchvision crops, a DataLoader spreads the work: slow, right, and the truth for tests."""

import contextlib
import multiprocessing
import signal
from multiprocessing import resource_tracker

import numpy as np
import PIL
import torch
from PIL import features
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fastsiam.data.backends.base import UndecodableError
from fastsiam.data.decode import decode_image
from fastsiam.data.sources.image_header import BadImageError, other_size
from fastsiam.data.sources.source import ImageSource
from fastsiam.runtime.cores import usable_cores

# A worker lives so long after a SIGTERM: time for the run's last step and checkpoint.
_SECONDS_TO_OUTLIVE = 25


def open_backend(source, sizes, batch_size, workers, device) -> "PilBackend":
    workers = usable_cores() if workers is None else workers
    return PilBackend(source, sizes, workers, device)


class PilBackend:
    """Crops by PIL's antialiased bilinear filter; `workers` processes, 0 for none."""

    def __init__(self, source: ImageSource, sizes: tuple[int, ...], workers: int, device: torch.device):
        turbo = features.version_feature("libjpeg_turbo")
        jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        self.description = f"pil {PIL.__version__} ({jpeg}, {workers or 'no'} workers)"
        self._source, self._sizes, self._workers, self._device = source, sizes, workers, device
        self._requests = _Requests()
        self._loader = None

    def crops(self, requests):
        if self._loader is None:
            self._loader = self._build()
        self._requests.current = requests
        with _deaf():
            batches = iter(self._loader)
        for indices, crops in batches:
            if isinstance(crops, dict):
                raise UndecodableError(crops)
            yield indices.numpy(), [group.to(self._device, non_blocking=True) for group in crops]

    def resize(self, sizes):
        self.close()
        self._sizes = sizes

    def close(self):
        self._loader = None

    def _build(self):
        # A fork would copy the locks of the decoder threads that live in this process. The server that forks the
        # workers imports torch once for all: two start in 0.1 s, of 3.1 s where each imports it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return DataLoader(
            _Crops(self._source, self._sizes),
            batch_sampler=self._requests,
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            multiprocessing_context=context if self._workers else None,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
        )


@contextlib.contextmanager
def _deaf():
    """Processes that start inside are deaf to the signals that ask a run to stop.

    Terminals, torchrun and schedulers signal whole groups of processes, and the one that trains decides when its
    workers end; they end when the server that forks them does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    # Of its own accord deaf to SIGTERM, and its start lets that through again here.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(_worker):
    """In a worker: a SIGTERM leaves time for a step and a checkpoint; multiprocessing itself ends workers by it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_TO_OUTLIVE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


class _Requests:
    """A batch sampler over the requests of the epoch at hand; one DataLoader and its workers serve all epochs."""

    current = ()

    def __iter__(self):
        for request in self.current:
            boxes = zip(*(group.transpose(1, 0, 2) for group in request.boxes), strict=True)
            yield list(zip(request.indices.tolist(), boxes, request.sizes, strict=True))


class _Crops(Dataset):
    def __init__(self, source, sizes):
        self._source, self._sizes = source, sizes

    def __getitem__(self, item):
        """Returns an index and its crops uint8 [V_g, S_g, S_g, 3] a group, or the sentence that names a bad file."""
        index, boxes, expected = item
        try:
            image = decode_image(self._source, index)
        except BadImageError as error:
            return index, str(error)
        # Boxes for another size would be filled up with black.
        if image.size[::-1] != tuple(expected):
            return index, other_size(self._source.name(index), image.size[::-1], expected)
        crops = [
            [TF.resized_crop(image, *box.tolist(), [size, size], InterpolationMode.BILINEAR) for box in of_group]
            for of_group, size in zip(boxes, self._sizes, strict=True)
        ]
        return index, [np.stack([np.asarray(crop) for crop in of_group]) for of_group in crops]


def _collate(samples):
    indices, crops = zip(*samples, strict=True)
    bad = {index: crop for index, crop in samples if isinstance(crop, str)}
    if bad:
        return torch.tensor(indices), bad
    groups = [torch.from_numpy(np.stack(of_group, 1)).flatten(0, 1) for of_group in zip(*crops, strict=True)]
    return torch.tensor(indices), groups
