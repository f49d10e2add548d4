"""PIL decodes, torchvision crops, a DataLoader spreads the work: slow, right, and the truth for tests."""

import multiprocessing

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fastsiam.data.sources import BadImageError, ImageSource


def open_backend(source, size, num_views, batch_size, workers, device) -> "PilBackend":
    workers = multiprocessing.cpu_count() if workers is None else workers
    return PilBackend(source, size, workers, device)


def decode(path) -> Image.Image:
    """The RGB image as displayed (EXIF orientation applied); raises `BadImageError` naming the file."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # PIL clips 16-bit grey at 255 where every other decoder scales it.
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImageError(f"{path} cannot be decoded: {error}") from error


class PilBackend:
    """Crops by PIL's antialiased bilinear filter; `workers` processes, 0 for none."""

    def __init__(self, source: ImageSource, size: int, workers: int, device: torch.device):
        self.description = f"pil {PIL.__version__} ({workers or 'no'} workers)"
        self._device = device
        self._requests = _Requests()
        self._loader = DataLoader(
            _Crops(source, size),
            batch_sampler=self._requests,
            num_workers=workers,
            collate_fn=_collate,
            # A fork would copy the locks of the decoder threads that live in this process.
            multiprocessing_context="forkserver" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def crops(self, requests):
        self._requests.current = requests
        for indices, crops in self._loader:
            if isinstance(crops, str):
                raise BadImageError(crops)
            yield indices.numpy(), crops.to(self._device, non_blocking=True)

    def close(self):
        self._loader = None


class _Requests:
    """A batch sampler over the requests of the epoch at hand; one DataLoader and its workers serve all epochs."""

    current = ()

    def __iter__(self):
        for request in self.current:
            yield list(zip(request.indices.tolist(), request.boxes.transpose(1, 0, 2), strict=True))


class _Crops(Dataset):
    def __init__(self, source, size):
        self._source, self._size = source, size

    def __getitem__(self, item):
        """The image's index and its crops uint8 [V, S, S, 3], or the sentence that names a bad file."""
        index, boxes = item
        try:
            image = decode(self._source.path(index))
        except BadImageError as error:
            return index, str(error)
        size = [self._size, self._size]
        crops = [np.asarray(TF.resized_crop(image, *box.tolist(), size, InterpolationMode.BILINEAR)) for box in boxes]
        return index, np.stack(crops)


def _collate(samples):
    indices, crops = zip(*samples, strict=True)
    bad = [crop for crop in crops if isinstance(crop, str)]
    if bad:
        return torch.tensor(indices), bad[0]
    views = torch.from_numpy(np.stack(crops, 1))
    return torch.tensor(indices), views.view(-1, *views.shape[2:])
