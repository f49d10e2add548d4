"""Chooses a backend by its name in the config, and opens it."""

from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path

import torch

from fastsiam.data.backends.base import Backend
from fastsiam.data.sources.beton import is_beton
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import MissingLibraryError


def open_backend(
    name: str,
    source: ImageSource,
    sizes: tuple[int, ...],
    batch_size: int,
    workers: int | None,
    device: torch.device,
    store_size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Backend:
    """Opens a backend by its config name: `dali`, `pil`, `ffcv` or `resident`.

    `sizes`: side in pixels of each group's views. `store_size` and `say`, which prints a line while images are decoded,
    are for `resident` alone.
    """
    module = import_module(f"fastsiam.data.backends.{name}")
    if name == "resident":
        return module.open_backend(open_cache(source, store_size, workers, device), source, sizes, device, say)
    return module.open_backend(source, sizes, batch_size, workers, device)


def open_cache(source: ImageSource, size: int, workers: int | None, device: torch.device):
    """Returns the `StoreCache` of the images as squares of `size` pixels; data.backend=auto's backend decodes them."""
    from fastsiam.data.backends.decoded_cache import BATCH, StoreCache

    decoder = open_backend(choose_backend("auto")[0], source, (size,), BATCH, workers, device)
    return StoreCache.of(source, size, decoder, device)


def choose_backend(asked: str, location: str | Path | None = None) -> tuple[str, str]:
    """Returns the backend that `data.backend` leads to for the images at `location`, and the reason in words."""
    if asked == "ffcv" or (asked == "auto" and is_beton(location)):
        if util.find_spec("ffcv") is None:
            # Says what to install.
            import_module("fastsiam.data.backends.ffcv_imports")
        return "ffcv", "asked for" if asked == "ffcv" else "auto: a .beton"
    if asked != "auto":
        if asked == "dali" and not dali_installed():
            raise MissingLibraryError(
                "data.backend: dali is not installed; pip install nvidia-dali-cuda120 (CUDA 12, and machines "
                "without a GPU) or nvidia-dali-cuda130 (CUDA 13), or set data.backend=pil",
                "no-dali",
                name="nvidia.dali",
            )
        return asked, "asked for"
    if dali_installed():
        return "dali", "auto: DALI is installed"
    return "pil", "auto: DALI is not installed (pip install nvidia-dali-cuda120 for speed)"


def dali_installed() -> bool:
    return util.find_spec("nvidia") is not None and util.find_spec("nvidia.dali") is not None
