"""Training on JPEGs by a run, beside its loader alone and its step alone, and which of the two is the limit.

On a CPU loader and step share the cores, so that training is slower than either; on a GPU they run side by side.
"""

import contextlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.cli import command
from benchmarks.harness.images import photographs
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples, take_turns
from benchmarks.loader import DRAWN_IMAGES, files_of
from fastsiam.config import Config, load_config
from fastsiam.train import Parts, opened

CONFIG = "r50_100ep"
# Batch and steps a sample.
BATCH = {"cpu": 16, "cuda": 512}
STEPS = {"cpu": 3, "cuda": 20}
REPEATS = 10


class EndToEnd:
    """One run and three ways to time it; each returns seconds per step.

    A real epoch is long: of training the first step is left out, in which the loader starts.
    """

    def __init__(self, parts: Parts):
        self.data, self._step, self.steps = parts.data, parts.step, parts.data.steps_per_epoch
        self.views = next(self.data.loader.epoch(0)).views
        self._numbers = itertools.count(1)

    def loader(self, epoch: int) -> float:
        """A whole epoch of batches, as many as training takes."""
        start = self._now()
        delivered = sum(1 for _ in self.data.loader.epoch(epoch))
        seconds = self._now() - start
        assert delivered == self.steps, f"{delivered} of {self.steps} batches"
        return seconds / self.steps

    def step(self, _epoch: int) -> float:
        """Steps on one batch that is already on the device."""
        start = self._now()
        for _ in range(self.steps - 1):
            self._step(self.views, next(self._numbers))
        return (self._now() - start) / (self.steps - 1)

    def end_to_end(self, epoch: int) -> float:
        """From the end of an epoch's first step to the end of its last."""
        batches = self.data.loader.epoch(epoch)
        self._step(next(batches).views, next(self._numbers))
        start = self._now()
        for batch in batches:
            self._step(batch.views, next(self._numbers))
        return (self._now() - start) / (self.steps - 1)

    def _now(self) -> float:
        device = self.data.runtime.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def in_turns(ways: dict[str, Callable[[int], float]], seconds: float) -> dict[str, Samples]:
    """Times each way in turns after an untimed call of each; its argument counts the calls."""
    deadline = time.perf_counter() + seconds
    for way in ways.values():
        way(0)
    left = deadline - time.perf_counter()
    return take_turns(list(ways), lambda name, number: ways[name](number + 1), REPEATS, left)


def run(results: Results, *, device: torch.device, minutes: float, images: Path | None = None) -> None:
    """ResNet-50 at 224 px for about `minutes`; `images` is a folder of JPEGs, drawn ones stand in for none."""
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
            f"run.dir={scratch}",
            "run.name=run",
        ]
        config = load_config(CONFIG, overrides)
        with contextlib.redirect_stdout(io.StringIO()), opened(config) as (parts, _):
            ways = EndToEnd(parts)
            named = {"loader": ways.loader, "step": ways.step, "end to end": ways.end_to_end}
            taken = in_turns(named, 60 * minutes)
            description = parts.data.description
        report(results, config, description, label, taken)


def report(results: Results, config: Config, description: str, label: str, taken: dict[str, Samples]) -> None:
    """One line each; that of training says which of the other two is the limit, and its share of it."""
    model, batch_size = config.model, config.train.batch_size
    params = {"encoder": model.encoder, "size": config.views.size, "batch": batch_size, "photographs": label}
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
