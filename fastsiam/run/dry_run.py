"""--dry-run: what would run, or the sentence with which the run would refuse; nothing is drawn, decoded or written."""

import contextlib
import sys

from fastsiam.config import Config
from fastsiam.data import demo_images
from fastsiam.data.backends.choose import choose_backend, open_cache
from fastsiam.data.backends.store_size import with_its_store
from fastsiam.data.build import check_grows, with_its_cores
from fastsiam.data.loader import check_batch_size, check_divides
from fastsiam.data.sources.open import demo_folder, open_sources
from fastsiam.data.sources.source import ImageSource
from fastsiam.optim.build import large_batch_warning
from fastsiam.run.console import opening_lines, schedule_line, session_lines, source_lines
from fastsiam.run.folder import RunFolder, run_path
from fastsiam.run.session import Session
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime


def dry_run(config: Config) -> None:
    """Print the resolved config on stdout, the first lines of the run on stderr; all ranks must ask.

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
            with Session(config, world) as session:
                session.check_start()
                session.finished_result()
                lines = session_lines(session)
    if warning := large_batch_warning(config):
        lines.append(f"warning: {warning}")
    if world.is_first:
        print(config.to_yaml(), end="", flush=True)
        print("\n".join(lines), file=sys.stderr)


def _before_its_first_start(
    config: Config, world: World, train: ImageSource | None, val: ImageSource | None
) -> list[str]:
    """The first lines of a run that would begin by drawing images (None here) or by decoding all of them."""
    data, batch_size = config.data, config.train.batch_size
    num_train = demo_images.TRAIN_PER_CLASS * len(demo_images.CLASSES) if train is None else len(train)
    num_val = len(val or ())
    if train is None and data.val is not None:
        num_val = demo_images.VAL_PER_CLASS * len(demo_images.CLASSES)
    run = RunFolder(config, run_path(config), _warn)
    run.check_config()
    run.check_start()
    check_divides(batch_size, world.size)
    check_batch_size(batch_size, num_train, data.train)
    check_grows(config, num_train // batch_size)
    loader, reason = choose_backend(data.backend, data.train)
    runtime = Runtime.of(config.train, world, run.environment())
    if train is not None:
        loader = _resident_text(with_its_cores(config, world), train, runtime.device)
    chosen = {"runtime": runtime, "reason": reason}
    where = f"would run in {run.path}"
    lines = opening_lines(config, num_train, num_val, loader, where, source_lines(train, val), **chosen)
    return [*lines, schedule_line(config, num_train // batch_size)]


def _resident_text(config: Config, source: ImageSource, device) -> str:
    from fastsiam.data.backends.resident import check_memory

    data = with_its_store(config, source, print).data
    cache = open_cache(source, data.store_size, data.workers, device)
    check_memory(cache, device)
    return f"resident ({cache.number:,} images of {cache.size} px, decoded by {cache.decoder})"


def _warn(sentence):
    print(f"warning: {sentence}")
