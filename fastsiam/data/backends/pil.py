"""PIL decodes, torchvision crops, a DataLoader spreads the work: slow, right, and the truth for tests."""

import contextlib
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


def open_backend(source, size, num_views, batch_size, workers, device) -> "PilBackend":
    workers = usable_cores() if workers is None else workers
    return PilBackend(source, size, workers, device)


class PilBackend:
    """Crops by PIL's antialiased bilinear filter; `workers` processes, 0 for none."""

    def __init__(self, source: ImageSource, size: int, workers: int, device: torch.device):
        turbo = features.version_feature("libjpeg_turbo")
        jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        self.description = f"pil {PIL.__version__} ({jpeg}, {workers or 'no'} workers)"
        self._source, self._size, self._workers, self._device = source, size, workers, device
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
            yield indices.numpy(), crops.to(self._device, non_blocking=True)

    def resize(self, size):
        self.close()
        self._size = size

    def close(self):
        self._loader = None

    def _build(self):
        return DataLoader(
            _Crops(self._source, self._size),
            batch_sampler=self._requests,
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            # A fork would copy the locks of the decoder threads that live in this process.
            multiprocessing_context="forkserver" if self._workers else None,
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
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(25))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


class _Requests:
    """A batch sampler over the requests of the epoch at hand; one DataLoader and its workers serve all epochs."""

    current = ()

    def __iter__(self):
        for request in self.current:
            yield list(zip(request.indices.tolist(), request.boxes.transpose(1, 0, 2), request.sizes, strict=True))


class _Crops(Dataset):
    def __init__(self, source, size):
        self._source, self._size = source, size

    def __getitem__(self, item):
        """The image's index and its crops uint8 [V, S, S, 3], or the sentence that names a bad file."""
        index, boxes, expected = item
        try:
            image = decode_image(self._source, index)
        except BadImageError as error:
            return index, str(error)
        # Boxes for another size would be filled up with black.
        if image.size[::-1] != tuple(expected):
            return index, other_size(self._source.name(index), image.size[::-1], expected)
        size = [self._size, self._size]
        crops = [np.asarray(TF.resized_crop(image, *box.tolist(), size, InterpolationMode.BILINEAR)) for box in boxes]
        return index, np.stack(crops)


def _collate(samples):
    indices, crops = zip(*samples, strict=True)
    bad = {index: crop for index, crop in samples if isinstance(crop, str)}
    if bad:
        return torch.tensor(indices), bad
    views = torch.from_numpy(np.stack(crops, 1))
    return torch.tensor(indices), views.view(-1, *views.shape[2:])
