"""--dry-run: print what would run, or the error with which the run would refuse; nothing is written."""

import contextlib
import sys

import torch

from fastsiam.config import Config
from fastsiam.config.method_sections import check_images
from fastsiam.config.micro_batch import check_micro_batch
from fastsiam.config.views import specs_of_run
from fastsiam.data import demo_images
from fastsiam.data.backends.choose import choose_backend, open_cache
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.build import check_grows, with_its_cores
from fastsiam.data.loader import check_batch_size, check_divides
from fastsiam.data.sources.open import demo_folder, open_sources
from fastsiam.data.sources.source import ImageSource
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer, large_batch_warning
from fastsiam.run.checkpoint import check_identity, identity
from fastsiam.run.console import choice_lines, opening_lines, schedule_line, source_lines
from fastsiam.run.metrics import Journal
from fastsiam.run.resume import find_run, finished
from fastsiam.run.start import started
from fastsiam.run.start_weights import check_encoder, start_weights
from fastsiam.runtime.distributed import World
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.cost import CostMeter
from fastsiam.training.progress import Progress
from fastsiam.training.state import State


def dry_run(config: Config) -> None:
    """Print the resolved config on stdout, the first lines of the run on stderr; all ranks must call.

    Raises what the run would raise before its first step, with nothing on stdout.
    """
    world = World.of_environment()
    # A file made of stdout is a config that can be run.
    with contextlib.redirect_stdout(sys.stderr), world.joined(config.train.device):
        folder = demo_folder(config)
        if folder is not None and not folder.exists():
            lines = [f"drawing   the demo images of seed {config.data.demo_seed} would be drawn to {folder}"]
            lines += _before_its_first_start(config, world, None, None)
        elif config.data.backend == "resident":
            lines = _before_its_first_start(config, world, *open_sources(config, _warn, print))
        else:
            lines = _as_started(config, world)
    if warning := large_batch_warning(config):
        lines.append(f"warning: {warning}")
    if world.is_first:
        print(config.to_yaml(), end="", flush=True)
        print("\n".join(lines), file=sys.stderr)


def _as_started(config, world):
    """The first lines of a run, from its start itself."""
    with started(config, world) as (runtime, data, progress, folder, _, journal, weights):
        _check_training(config, runtime, progress, folder, journal)
        lines = opening_lines(config, runtime, data, f"would run in {folder.path}")
        return [*lines, *(weights.lines() if weights else ())]


def _check_training(config, runtime, progress, folder, journal):
    """Raise what a run raises between its start and its first step, and say where nothing is left to do."""
    world = runtime.world
    with world.together():
        build_optimizer(build_method(config, world.size, world.rank).to(runtime.device), config)
        if world.is_first:
            folder.check_start()
            finished(config, folder, progress, journal)


def _before_its_first_start(
    config: Config, world: World, train: ImageSource | None, val: ImageSource | None
) -> list[str]:
    """The first lines of a run that would begin by drawing images (None here) or by decoding all of them."""
    data, batch_size = config.data, config.train.batch_size
    num_train = demo_images.TRAIN_PER_CLASS * len(demo_images.CLASSES) if train is None else len(train)
    num_val = len(val or ())
    if train is None and data.val is not None:
        num_val = demo_images.VAL_PER_CLASS * len(demo_images.CLASSES)
    journal = Journal(world)
    folder, saved = find_run(config, world, journal)
    check_encoder(config)
    weights = None if saved else start_weights(config, world)
    check_divides(batch_size, world.size)
    check_micro_batch(batch_size, config.train.micro_batch, world.size)
    check_batch_size(batch_size, num_train, data.train)
    check_images(config.method, num_train, data.train)
    check_grows(config, num_train // batch_size)
    backend, reason = choose_backend(data.backend, data.train)
    runtime, loader = Runtime.of(config.train, world, saved.get("computation")), backend
    if train is not None:
        loader = _resident_text(with_its_cores(config, world), train, runtime.device)
        if saved:
            views = specs_of_run(config.view_groups, config.view_stages)
            check_identity(saved["identity"], identity(train, views, backend), folder.path)
    steps_per_epoch, state = num_train // batch_size, State(**saved["state"]) if saved else None
    with EnergyMeter.of(runtime.device, journal.warn) as energy:
        cost = CostMeter(folder.path, energy, warn=journal.warn, collect=world.collect)
        progress = Progress(config, steps_per_epoch, cost, world, state, saved.get("budget"))
        _check_training(config, runtime, progress, folder, journal)
    where = f"would run in {folder.path}"
    lines = choice_lines(config, runtime, num_train, num_val, loader, reason, where, source_lines(train, val))
    return [*lines, schedule_line(config, steps_per_epoch), *(weights.lines() if weights else ())]


def _resident_text(config: Config, source: ImageSource, device: torch.device) -> str:
    from fastsiam.data.backends.resident import check_memory

    data = with_its_store(config, source, print).data
    cache = open_cache(source, data.store_size, data.workers, device)
    check_memory(cache, device)
    return f"resident ({cache.number:,} images of {cache.size} px, decoded by {cache.decoder})"


def _warn(notice):
    print(f"warning: {notice}")
