"""CPU time of the host's work on a step's draws, by part, for the `fastsiam` that is imported: one JSON line.

`python -m benchmarks.variants.host CONFIG BATCH ROUNDS`. It takes the names that commits of before the package had.
"""

import contextlib
import importlib
import inspect
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastsiam import load_config


def _first_of(*names):
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def parts(config, batch: int) -> dict:
    """Functions of an epoch, by name: what each batch of `batch` images needs of two views."""
    rng = _first_of("fastsiam.data.rng", "fastsiam.data.draws")
    groups = getattr(config, "view_groups", None)
    spec = groups[0].spec if groups else importlib.import_module("fastsiam.data.views").view_specs(config.views)[0]
    generator = np.random.default_rng(0)
    # CIFAR's size, or sides as ImageNet's are spread.
    sizes = np.full((batch, 2), 32) if spec.size <= 32 else generator.integers(300, 600, (batch, 2))
    indices = generator.integers(0, 1_000_000, batch)

    def boxes(epoch):
        return np.stack([rng.crop_boxes(spec, 0, epoch, indices, view, sizes) for view in range(2)])

    def augmentations(epoch):
        views = [rng.augment_draws(spec, 0, epoch, indices, view) for view in range(2)]
        return rng.AugmentDraws.concatenate(views)

    view_table = _first_of("fastsiam.kernels.augment_table", "fastsiam.kernels.table").view_table
    drawn = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(augmentations(0)).items()}
    drawn |= {"exact": spec.color == "exact", "blur_kind": getattr(spec, "blur_kind", None)}
    taken = {name: drawn[name] for name in inspect.signature(view_table).parameters}
    return {"boxes": boxes, "augmentations": augmentations, "table": lambda epoch: view_table(**taken)}


@contextlib.contextmanager
def hand_over(batch: int):
    """Gives a function that hands DALI the names of `batch` files, and takes the addresses of what it has decoded."""
    from fastsiam.data.backends.base import CropRequest
    from fastsiam.data.backends.dali import DaliBackend
    from fastsiam.data.sources.open import open_source

    with tempfile.TemporaryDirectory() as folder:
        for number in range(batch):
            path = Path(folder, f"n{number % 10:08d}", f"n{number % 10:08d}_{number}.JPEG")
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (number % 256, 0, 0)).save(path)
        source, indices = open_source(folder), np.arange(batch)
        source.look(indices)
        request = CropRequest(indices, (np.zeros((2, batch, 4), np.int32),), source.sizes(indices))
        backend = DaliBackend(source, [32], batch, 1, torch.device("cpu"))
        # The kernel is the device's work.
        backend._crop = lambda *arguments: arguments[0]
        delivered = backend.crops(itertools.repeat(request))
        try:
            yield lambda _: next(delivered)
        finally:
            delivered.close()


def samples(config, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of this thread's CPU for each part, round after round; the hand-over where DALI and this backend are."""
    found, calls = {}, parts(config, batch)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            calls["hand-over to DALI"] = stack.enter_context(hand_over(batch))
        for number in range(rounds + 3):
            for name, call in calls.items():
                began = time.thread_time()
                call(number)
                if number >= 3:
                    found.setdefault(name, []).append(time.thread_time() - began)
    return found


def main(name: str, batch: str, rounds: str) -> int:
    torch.set_num_threads(1)
    config = load_config(name, ["data.backend=synthetic"])
    print(json.dumps(samples(config, int(batch), int(rounds))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
