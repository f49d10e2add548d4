"""Training on JPEGs by the product, beside its loader alone and its step alone, and which of the two is the limit.

On a CPU loader and step share the cores, so training is slower than either; on a GPU they run side by side.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.cli import command
from benchmarks.harness.images import photographs
from benchmarks.harness.product import ProductRun
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples, take_turns, timed
from benchmarks.loader import DRAWN_IMAGES, files_of
from fastsiam.config import Config, load_config
from fastsiam.data.build import build_loader
from fastsiam.data.loader import Loader

CONFIG = "r50_100ep"
# Batch and steps a sample.
BATCH = {"cpu": 16, "cuda": 512}
STEPS = {"cpu": 3, "cuda": 20}
REPEATS = 10


class EndToEnd:
    """Three ways to time one run; each returns seconds per step.

    The loader alone is a second one: that of the run has an epoch open while the run stands still.
    """

    def __init__(self, run: ProductRun, loader: Loader):
        self._run, self._loader = run, loader
        self._device, self.steps = run.parts.data.runtime.device, loader.steps_per_epoch
        self._views = next(loader.epoch(0)).views

    def loader(self, epoch: int) -> float:
        """Times a whole epoch of batches, as many as training takes."""

        def drain():
            delivered = sum(1 for _ in self._loader.epoch(epoch))
            assert delivered == self.steps, f"{delivered} of {self.steps} batches"

        return timed(drain, self._device) / self.steps

    def step(self, _epoch: int) -> float:
        """Times steps on one batch that is already on the device."""
        return self._seconds(lambda: self._run.parts.step(self._views, 1))

    def end_to_end(self, _epoch: int) -> float:
        """Times the product's loop after the first step of an epoch, in which its loader starts."""
        self._run()
        return self._seconds(self._run)

    def _seconds(self, call):
        timed(lambda: None, self._device)
        return timed(lambda: [call() for _ in range(self.steps - 1)], self._device) / (self.steps - 1)


def in_turns(ways: dict[str, Callable[[int], float]], seconds: float) -> dict[str, Samples]:
    """Times each way in turns after an untimed call of each; its argument counts the calls."""
    deadline = time.perf_counter() + seconds
    for way in ways.values():
        way(0)
    left = deadline - time.perf_counter()
    return take_turns(list(ways), lambda name, number: ways[name](number + 1), REPEATS, left)


def run(results: Results, *, device: torch.device, minutes: float, images: Path | None = None) -> None:
    """Trains ResNet-50 at 224 px for about `minutes`; `images` is a folder of JPEGs, None draws some."""
    batch_size, steps = BATCH[device.type], STEPS[device.type]
    with tempfile.TemporaryDirectory() as scratch:
        folder, label = photographs(images, scratch, DRAWN_IMAGES)
        # A list reaches what lies below its own folder.
        link = Path(scratch) / "photographs"
        link.symlink_to(folder.resolve())
        files = [f"photographs/{Path(path).relative_to(folder.resolve())}" for path in files_of(folder)]
        listed = Path(scratch) / "images.txt"
        listed.write_text("\n".join(files[index % len(files)] for index in range(batch_size * steps)))
        overrides = [
            f"data.train={listed}",
            "data.val=null",
            f"train.batch_size={batch_size}",
            f"train.device={device.type}",
        ]
        with ProductRun(load_config(CONFIG, overrides)) as training:
            config, data = training.config, training.parts.data
            options = {"device": data.runtime.device, "dtype": data.runtime.dtype}
            ways = EndToEnd(training, build_loader(data.config, data.source, **options))
            named = {"loader": ways.loader, "step": ways.step, "end to end": ways.end_to_end}
            taken = in_turns(named, 60 * minutes)
            description = data.description
        report(results, config, description, label, taken)


def report(results: Results, config: Config, description: str, label: str, taken: dict[str, Samples]) -> None:
    """Writes one line each; the line of training names the slower of the other two, and its share of that."""
    model, batch_size = config.model, config.train.batch_size
    params = {"encoder": model.encoder, "size": config.views[0].full_size, "batch": batch_size, "photographs": label}
    rates = {name: batch_size / samples.median for name, samples in taken.items()}
    limit = min("loader", "step", key=rates.get)
    for name, samples in taken.items():
        more = {}
        if name == "end to end":
            more = {"limit": limit, "share_of_limit": rates[name] / rates[limit]}
        numbers = {"images_per_second": rates[name], "description": description, **more}
        results.add("end_to_end", name, params, samples, **numbers)


if __name__ == "__main__":
    sys.exit(command(run, "end_to_end", "Time training on JPEGs.", minutes=2.0))
