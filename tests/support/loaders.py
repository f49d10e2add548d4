"""Loaders of the photos for every backend."""

import dataclasses

import torch

from fastsiam.config.views import RECIPES
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import Loader
from fastsiam.data.sources.open import open_source
from tests.support.ffcv_files import beton_of

SIZE = 24
SPEC = dataclasses.replace(RECIPES["simsiam"], size=SIZE)

# At least the longest side of the photos: a store of this size loses nothing but to rounding.
STORE = 200
CPU = torch.device("cpu")


def make(photos, backend, *, batch_size=5, workers=None, dtype=torch.float32, rank=0, world_size=1, spec=SPEC, seed=0):
    source = source_of(photos, backend)
    workers = (0 if backend == "pil" else 1) if workers is None else workers
    opened = open_backend(backend, source, spec.size, 2, batch_size // world_size, workers, CPU, STORE)
    return Loader(
        source, (spec, spec), opened, batch_size=batch_size, seed=seed, dtype=dtype, rank=rank, world_size=world_size
    )


def source_of(photos, backend):
    """The photos as the backend reads them: for ffcv half as JPEG, half as pixels, none shrunk."""
    if backend != "ffcv":
        return open_source(str(photos))
    return beton_of(photos, "mixed")


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
