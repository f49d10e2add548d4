"""Loaders of a config: for training and for evaluation."""

from collections.abc import Callable

import torch

from fastsiam.config import Config
from fastsiam.config.views import view_specs
from fastsiam.data.backends.choose import choose_backend, open_backend
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.loader import EvaluationLoader, Loader, check_divides
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
    """The training loader of a config: a `Loader`, or `SyntheticLoader` with `data.backend=synthetic`.

    Raises `UserError` for a batch larger than the data, `MissingLibraryError` naming the extra for a backend
    that is not installed. `say` prints a line while the backend `resident` decodes its images.
    """
    device = torch.device(device)
    specs = view_specs(config.views)
    check_divides(config.train.batch_size, world_size)
    name, _ = choose_backend(config.data.backend, config.data.train)
    if name == "synthetic":
        from fastsiam.data.backends.synthetic import SyntheticLoader

        train = config.train
        loader = SyntheticLoader(
            specs, batch_size=train.batch_size, seed=train.seed, device=device, dtype=dtype, world_size=world_size
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
    check_grows(config, len(source) // config.train.batch_size)
    share, augments = config.train.batch_size // world_size, config.data.augment == "dali"
    if augments:
        from fastsiam.data.backends.dali_augment import open_recipe

        backend = open_recipe(source, specs, share, config.data.workers, device, dtype)
    else:
        data, size = config.data, config.views.full_size
        backend = open_backend(name, source, size, len(specs), share, data.workers, device, data.store_size, say)
    return Loader(
        source,
        specs,
        backend,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        dtype=dtype,
        skip=skip,
        rank=rank,
        world_size=world_size,
        backend_augments=augments,
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
    """The loader of kNN and of the collapse guard: the training backend and normalisation, no augmentation.

    Batches are as large as those of one of `world_size` processes in training.
    """
    name, _ = choose_backend(config.data.backend, source.root)
    batch_size = min(config.train.batch_size // world_size, len(source))
    config = with_its_store(config, source)
    data, size, device = config.data, config.views.full_size, torch.device(device)
    backend = open_backend(name, source, size, 1, batch_size, data.workers, device, data.store_size, say)
    return EvaluationLoader(
        source,
        view_specs(config.views)[0],
        backend,
        batch_size=batch_size,
        crop_ratio=config.evaluate.crop_ratio,
        dtype=dtype,
        skip=skip,
    )


def check_grows(config: Config, steps_per_epoch: int) -> None:
    """Raise `UserError` where views would grow from epoch to epoch and the run is known to have but one."""
    budget, views = config.to_spend, config.views
    epochs = budget.amount
    if budget.kind == "images":
        epochs /= max(steps_per_epoch * config.train.batch_size, 1)
    if len(views.sizes) > 1 and budget.counts_steps and epochs <= 1:
        raise UserError(
            f"views.size: {views.size} grows from epoch to epoch, and {budget.text} are no more than one; set "
            f"views.size={views.full_size}, or more to spend"
        )


def with_its_cores(config: Config, world: World) -> Config:
    """`data.workers: null` made a number where several ranks share the cores of a machine; all ranks must ask."""
    sharing = world.ranks_on_these_cores()
    if sharing == 1 or config.data.workers is not None:
        return config
    workers = max(1, usable_cores() // sharing)
    return config.with_values({"data.workers": workers})
