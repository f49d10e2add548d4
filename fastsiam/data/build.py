"""Builds the loaders of a config: for training and for evaluation."""

from collections.abc import Callable

import numpy as np
import torch

from fastsiam.config import Config
from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data.backends.choose import choose_backend, open_backend
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.loader import EvaluationLoader, Loader, check_batch_size, check_divides, full_sizes
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.runtime.cores import usable_cores
from fastsiam.runtime.distributed import World


def build_loader(
    config: Config,
    source: ImageSource | None = None,
    *,
    skip: SkipList | None = None,
    device="cpu",
    dtype=torch.float32,
    rank: int = 0,
    world_size: int = 1,
    say: Callable[[str], None] = lambda line: None,
):
    """Returns the training loader of a config: a `Loader`, or `SyntheticLoader` with `data.backend=synthetic`.

    Raises `UserError` for a batch larger than the data, `MissingLibraryError` naming the extra for a backend
    that is not installed. `say` prints a line while the backend `resident` decodes its images.
    """
    device = torch.device(device)
    groups, train = config.view_groups, config.train
    name, _ = choose_backend(config.data.backend, config.data.train)
    if name == "synthetic":
        from fastsiam.data.backends.synthetic import SyntheticLoader

        check_divides(train.batch_size, world_size)
        loader = SyntheticLoader(
            groups, batch_size=train.batch_size, seed=train.seed, device=device, dtype=dtype, world_size=world_size
        )
        check_grows(config, loader.steps_per_epoch)
        return loader
    if source is None:
        from fastsiam.data.sources.open import open_source

        data = config.data
        source = open_source(
            data.train, scanned=data.manifest, max_bad_fraction=data.max_bad_fraction, levels=data.deep_pixels
        )
    config = with_its_store(config, source)
    check_grows(config, len(source) // train.batch_size)
    data = config.data
    return open_training_loader(
        source,
        groups,
        batch_size=train.batch_size,
        seed=train.seed,
        backend=name,
        augment=data.augment,
        workers=data.workers,
        store_size=data.store_size,
        skip=skip,
        device=device,
        dtype=dtype,
        rank=rank,
        world_size=world_size,
        say=say,
    )


def build_evaluation_loader(
    config: Config,
    source: ImageSource,
    *,
    skip: SkipList | None = None,
    device="cpu",
    dtype=torch.float32,
    world_size: int = 1,
    say: Callable[[str], None] = lambda line: None,
):
    """Returns the loader of kNN and of the collapse guard: the training backend and no augmentation.

    Images have the size and normalisation of the first group of views, and batches are as large as those of one of
    `world_size` ranks in training.
    """
    config = with_its_store(config, source)
    data = config.data
    return open_evaluation_loader(
        source,
        config.view_groups[0].spec,
        batch_size=config.train.batch_size // world_size,
        crop_ratio=config.evaluate.crop_ratio,
        backend=data.backend,
        workers=data.workers,
        store_size=data.store_size,
        skip=skip,
        device=device,
        dtype=dtype,
        say=say,
    )


def open_evaluation_loader(
    source: ImageSource,
    spec: ViewSpec,
    *,
    batch_size: int,
    crop_ratio: float = 0.875,
    backend: str = "auto",
    workers: int | None = None,
    store_size: int | None = None,
    skip: SkipList | None = None,
    device="cpu",
    dtype=torch.float32,
    say: Callable[[str], None] = lambda line: None,
) -> EvaluationLoader:
    """Returns the loader of an encoder that has no config: size and normalisation of `spec`, no augmentation.

    The other arguments are the keys of that name in the sections data, train and evaluate; `batch_size` is cut to the
    number of images.
    """
    name, _ = choose_backend(backend, source.root)
    batch_size, device = min(batch_size, len(source)), torch.device(device)
    opened = open_backend(name, source, (spec.size,), batch_size, workers, device, store_size or spec.size, say)
    return EvaluationLoader(source, spec, opened, batch_size=batch_size, crop_ratio=crop_ratio, dtype=dtype, skip=skip)


def open_training_loader(
    source: ImageSource,
    groups: tuple[ViewGroup, ...],
    *,
    batch_size: int,
    seed: int,
    backend: str = "auto",
    augment: str = "fastsiam",
    workers: int | None = None,
    store_size: int | None = None,
    skip: SkipList | None = None,
    device="cpu",
    dtype=torch.float32,
    rank: int = 0,
    world_size: int = 1,
    among: np.ndarray | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Loader:
    """Returns the training loader of images and views that need no config: augmented views, with their labels.

    `backend`, `augment`, `workers` and `store_size` are the keys of that name in the section data. `batch_size` is that
    of all ranks; `among`: [M] indices of the only images that are used, None for all. Raises `UserError` for a batch
    larger than the data.
    """
    # Before the backend resident decodes all images.
    check_divides(batch_size, world_size)
    check_batch_size(batch_size, len(source if among is None else among), source.root)
    name, _ = choose_backend(backend, source.root)
    sizes, share, device = full_sizes(groups), batch_size // world_size, torch.device(device)
    if augment == "dali":
        from fastsiam.data.backends import dali_augment

        opened = dali_augment.open_backend(source, groups, share, workers, device, dtype)
    else:
        opened = open_backend(name, source, sizes, share, workers, device, store_size or max(sizes), say)
    return Loader(
        source,
        groups,
        opened,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        skip=skip,
        rank=rank,
        world_size=world_size,
        among=among,
    )


def check_grows(config: Config, steps_per_epoch: int) -> None:
    """Raises `UserError` where views would grow from epoch to epoch and a budget in images ends in the first.

    A run of `train.epochs=1` has the full size (`Config.sizes_at`).
    """
    budget = config.to_spend
    growing = next((group for group in config.views if len(group.sizes) > 1), None)
    if growing and budget.kind == "images" and budget.amount <= steps_per_epoch * config.train.batch_size:
        raise UserError(
            f"views.size: {growing.size} grows from epoch to epoch, and {budget.text} are at most one epoch; set "
            f"views.size={growing.full_size}, or train longer",
            "no-epochs-to-grow",
        )


def with_its_cores(config: Config, world: World) -> Config:
    """Makes `data.workers: null` a number where several ranks share the cores of a machine; all ranks must call."""
    workers = workers_of(config.data.workers, world)
    return config if workers == config.data.workers else config.with_values({"data.workers": workers})


def workers_of(asked: int | None, world: World) -> int | None:
    """`asked`, or where that is None and several ranks share cores, this rank's share of them; all ranks must call."""
    sharing = world.ranks_on_these_cores()
    return max(1, usable_cores() // sharing) if asked is None and sharing > 1 else asked
