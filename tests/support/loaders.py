"""Loaders of the photos for every backend."""

import dataclasses
from collections import deque

import numpy as np
import torch

from fastsiam.config.views import RECIPES, ViewGroup
from fastsiam.data import rng
from fastsiam.data.backends.base import CropRequest
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import Loader, full_sizes
from fastsiam.data.sources.open import open_source
from fastsiam.data.sources.source import ImageSource
from tests.support.ffcv_files import beton_of

SIZE = 24
SPEC = dataclasses.replace(RECIPES["simsiam"], size=SIZE)
# Levels of 0 to 255 as they are after all draws of the paper.
LEVELS = dataclasses.replace(RECIPES["simsiam"], mean=(0.0,) * 3, std=(1 / 255,) * 3)

# At least the longest side of the tests' images: a store of this size loses nothing but to rounding.
STORE = 240
CPU = torch.device("cpu")
# data.augment=dali: a backend that augments.
RECIPE = "dali's recipe"


def make(
    photos, backend, *, groups=None, spec=SPEC, count=2, batch_size=5, workers=None, dtype=torch.float32,
    rank=0, world_size=1, seed=0, skip=None, device=CPU,
):  # fmt: skip
    """Returns a loader of `groups` of views, or of `count` views of one spec; `photos`: a folder or a source."""
    source, groups = source_of(photos, backend), groups or (ViewGroup(count, spec),)
    workers = (0 if backend == "pil" else 1) if workers is None else workers
    if backend == RECIPE:
        from fastsiam.data.backends import dali_augment

        opened = dali_augment.open_backend(source, groups, batch_size, workers, torch.device(device), dtype)
    else:
        sizes, share = full_sizes(groups), batch_size // world_size
        opened = open_backend(backend, source, sizes, share, workers, torch.device(device), STORE)
    numbers = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size}
    return Loader(source, groups, opened, dtype=dtype, skip=skip, **numbers)


def source_of(photos, backend):
    """The photos as the backend reads them: for ffcv half as JPEG, half as pixels, none shrunk."""
    if isinstance(photos, ImageSource):
        return photos
    return beton_of(photos, "mixed") if backend == "ffcv" else open_source(str(photos))


def crops_of(made, epoch=0):
    """The uint8 crops of a loader's first group in an epoch, as its backend delivers them."""
    return torch.cat([crops for _, (crops, *_) in made.backend.crops(made._requests(epoch, 0, deque()))])


def squashed(source, backend, size):
    """All images of a source, resized to squares uint8 [N, size, size, 3] by a backend; resident stores that size."""
    opened = open_backend(backend, source, (size,), len(source), 0 if backend == "pil" else 1, CPU, size)
    sizes = source.sizes(np.arange(len(source)))
    boxes = np.concatenate([np.zeros_like(sizes), sizes], 1)[None]
    ((_, (crops,)),) = opened.crops([CropRequest(np.arange(len(source)), (boxes,), sizes)])
    opened.close()
    return crops.numpy()


def jittered(drawn: rng.AugmentDraws) -> np.ndarray:
    """[N] bool: views whose colour changes."""
    return (drawn.factors != np.float32(rng.NO_JITTER)).any(1)


def count_decoders(monkeypatch):
    """Name and device of each decoder, of any kind, that is put into a graph of DALI's from now on."""
    from nvidia.dali import fn

    found = []

    def counting(name, real):
        return lambda *arguments, **options: found.append((name, options["device"])) or real(*arguments, **options)

    for name in dir(fn.decoders):
        if name.startswith("image"):
            monkeypatch.setattr(fn.decoders, name, counting(name, getattr(fn.decoders, name)))
    return found
