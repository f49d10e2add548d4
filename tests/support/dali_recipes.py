"""Loaders whose backend augments."""

import dataclasses

import torch

from fastsiam.config.views import RECIPES
from fastsiam.data.loader import Loader
from fastsiam.data.sources.open import open_source

# Levels of 0 to 255 are delivered as they are.
EVERYTHING = dataclasses.replace(
    RECIPES["simsiam"], size=24, solarize=0.4, grayscale=0.3, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)
)


def make(photos, spec, dtype=torch.float32, skip=None, batch_size=8, device="cpu"):
    from fastsiam.data.backends.dali_augment import open_recipe

    source = open_source(str(photos))
    backend = open_recipe(source, (spec, spec), batch_size, 1, torch.device(device), dtype)
    numbers = {"batch_size": batch_size, "seed": 0, "dtype": dtype}
    return Loader(source, (spec, spec), backend, **numbers, skip=skip, backend_augments=True)
