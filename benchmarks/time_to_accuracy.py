"""Race to a kNN accuracy: the time in which each contestant reaches it, and the accuracy of each in equal time.

    python -m benchmarks.time_to_accuracy --config benchmarks/race/cifar10_cpu.yaml --data data/cifar10 --train 10000 \\
        --val 2000 --minutes-each 5 --seeds 3 --target 45 --solo-learn PATH --out DIR

Everybody trains the model of the config (which must have a cosine schedule) for the same time, and anneals over it:
progress is the clock over the time that a run has. The clock stands during evaluation, which is ours for all; a few
steps on a state that is thrown away come before it, so that compilation and the start of workers are not on it. Each
run has a process to itself. With the first seed peers try a grid of learning rates, the other seeds run at the best;
contestants take turns, seed by seed. Before its first run a peer tries how it loads fastest.

DIR/time_to_accuracy.jsonl gets a line a run. The same command goes on where it was stopped, and a run that is there is
not run again. At the end standings.json, time_to_accuracy.png and .svg are written. Rules: benchmarks/race/RECORDS.md.
"""

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.worker_process import apart
from benchmarks.peers import AbsentError
from benchmarks.race import plot
from benchmarks.race.contestants import CONTESTANTS, FASTSIAM, OURS, PLAIN, Loading, overrides_of
from benchmarks.race.methods import Entry, protocol
from benchmarks.race.standings import BENCHMARK, Lines, best_rate, plus_minus, read, seconds_to, standings
from benchmarks.race.subset import write_list
from benchmarks.race.timed_run import Job, controls, run_job, try_loadings
from fastsiam.cli import let_threads_sleep
from fastsiam.config import Config, load_config
from fastsiam.data.sources.open import draw_missing_demo, open_source
from fastsiam.errors import UserError

EVALUATIONS = 10
# No more often than every so many seconds of training: a short race would mostly evaluate.
_BETWEEN_EVALUATIONS = 10.0
# Of --minutes, what is left for training beside evaluation, warm-up and the start of processes.
_TRAINING_SHARE = 0.6
DEFAULT = (FASTSIAM, PLAIN, "authors", "lightly", "solo-learn", "solo-learn DALI")


def in_words(name: str, own: float) -> float:
    """A rate of the command line: `0.4`, or `2x` for twice the config's `own`."""
    try:
        rate = float(name.removesuffix("x")) * (own if name.endswith("x") else 1)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        message = f"--rates: '{name}' is not a rate; write a positive base_lr, as in 0.4, or a multiple, as in 2x"
        raise UserError(message, code="not-a-rate")
    return rate


class Race:
    """Race with fixed data and settings: its runs."""

    def __init__(
        self, lines: Lines, name: str, images: "Images", seconds: float, target: float, checkout, call,
        entry: Entry | None = None, evaluations: int = EVALUATIONS,
    ):  # fmt: skip
        """`call(function, *arguments)` runs a job of the config `name`, `apart` or in this process.

        `entry`: the method in place of the config's, in a race of methods.
        """
        self._lines, self._name, self._entry = lines, name, entry
        self._overrides, self._label = [*images.overrides, *(entry.overrides if entry else ())], images.label
        self._seconds, self._target, self._checkout, self._call = seconds, target, checkout, call
        self.config = load_config(name, self._overrides)
        check_config(self.config)
        self.evaluations = max(2, min(evaluations, int(seconds / _BETWEEN_EVALUATIONS)))
        self.params = self._params()
        self._done = 0

    def run(self, contestants: dict[str, list[float]], seeds: int) -> None:
        """`contestants`: the grid of each. Raises `UserError` where none can run."""
        total = sum(len(grid) for grid in contestants.values()) + (seeds - 1) * len(contestants)
        first = self.config.train.seed
        self._control(first)
        grids = {variant: [] for variant in contestants}
        for turn in range(max(map(len, contestants.values()))):
            for variant, grid in contestants.items():
                if turn < len(grid) and variant in grids:
                    line = self._one(variant, first, grid[turn], total)
                    if line is None:
                        del grids[variant]
                    else:
                        grids[variant].append(line)
        best = {variant: best_rate(lines) for variant, lines in grids.items()}
        for seed in range(first + 1, first + seeds):
            for variant, rate in best.items():
                self._one(variant, seed, rate, total)
        if not best:
            message = f"--contestants: none of {', '.join(contestants)} can run here; name others"
            raise UserError(message, code="no-contestant")

    def _one(self, variant, seed, base_lr, total) -> dict | None:
        """Returns the line of a run, old or new; None for a peer that is absent."""
        self._done += 1
        params = {**self.params, "seed": seed, "base_lr": base_lr}
        print(f"run {self._done} of {total}: {variant}, seed {seed}, base_lr {base_lr:g}", flush=True)
        line = self._lines.find("run", variant, params)
        if line:
            print(f"  already there: kNN {line['knn']:.2f} % after {line['seconds']:.0f} s", flush=True)
            return line
        overrides = [*self._overrides, f"train.seed={seed}", f"optimizer.base_lr={base_lr!r}"]
        overrides += [*overrides_of(variant, self.config), *(self._entry.of(variant).overrides if self._entry else ())]
        config = load_config(self._name, overrides)
        job = Job(variant, config, self._seconds, self.evaluations, None, self._checkout)
        try:
            if variant not in OURS:
                job = replace(job, loading=self._loading(job))
            outcome = self._call(run_job, job)
        except AbsentError as error:
            print(f"  absent: {error}", flush=True)
            if not self._lines.find("absent", variant, self.params):
                self._lines.add("absent", variant, self.params, absent=str(error))
            return None
        numbers = outcome.numbers()
        reached = seconds_to(numbers["curve"], self._target)
        numbers |= {"target": self._target, "seconds_to_target": reached}
        if self._entry:
            numbers["protocol"] = protocol(variant, config)
        line = self._lines.add("run", variant, params, **numbers)
        told = "not reached" if reached is None else f"in {reached:.0f} s"
        print(
            f"  kNN {line['knn']:.2f} % after {line['seconds']:.0f} s, {line['images_per_second']:.0f} images/s; "
            f"{self._target:g} % {told}; warm-up {line['warmup_seconds']:.0f} s",
            flush=True,
        )
        return line

    def _loading(self, job):
        """Returns the fastest way in which this peer loads; tried once a race."""
        params = {**self.params, "trial": "loader"}
        line = self._lines.find("trial", job.variant, params)
        if line is None:
            print("  how it loads fastest:", flush=True)
            tried = sorted(self._call(try_loadings, job).items(), key=lambda pair: -pair[1])
            rates = {str(loading): rate for loading, rate in tried}
            loading = tried[0][0]
            line = self._lines.add("trial", job.variant, params, chosen=[loading.kind, loading.workers], rates=rates)
        return Loading(*line["chosen"])

    def _control(self, seed):
        params = {**self.params, "seed": seed}
        line = self._lines.find("control", "control", params)
        if line is None:
            line = self._lines.add("control", "control", params, **self._call(controls, self.config))
        print(
            f"before training: kNN {line['untrained_knn']:.2f} % with random weights (batch-norm statistics filled), "
            f"{line['raw_pixels_knn']:.2f} % on raw pixels",
            flush=True,
        )

    def _params(self):
        """Returns what the runs of a race share; `settings` is a hash of all that they compute with."""
        config, data = self.config, self.config.data
        sources = [open_source(data.train), open_source(data.val, "data.val")]
        sections = config.model_dump(mode="json", include={"views", "model", "method", "optimizer", "evaluate"})
        del sections["optimizer"]["base_lr"]
        for key in ("knn_every_epochs", "controls"):
            del sections["evaluate"][key]
        sections["train"] = [getattr(config.train, key) for key in ("precision", "compile", "channels_last")]
        if config.train.views_grow_at:
            sections["train"].append(config.train.views_grow_at)
        sections["data"] = [data.backend, data.augment, data.store_size, *(source.fingerprint() for source in sources)]
        if self._entry:
            sections["peers"] = {name: list(recipe.overrides) for name, recipe in self._entry.peers.items()}
        digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:8]
        width = {} if config.model.width is None else {"width": config.model.width}
        method = {"method": self._entry.name} if self._entry else {}
        return {
            **method,
            "data": self._label,
            "images": len(sources[0]),
            "val": len(sources[1]),
            "encoder": config.model.encoder,
            **width,
            "size": config.views[0].full_size,
            "batch": config.train.batch_size,
            "seconds": self._seconds,
            "evaluations": self.evaluations,
            "settings": digest,
        }


def check_config(config: Config) -> None:
    """Raises `UserError` for a setting that the contestants do not all have."""
    views, optimizer = config.views[0], config.optimizer
    wanted = (
        ("optimizer.name", optimizer.name, "sgd"),
        ("optimizer.schedule", optimizer.schedule, "cosine"),
        ("method.stop_gradient", getattr(config.method, "stop_gradient", True) or config.method.name == "simclr", True),
        ("model.bn_statistics", config.model.bn_statistics, "per_view"),
        ("views.solarize", views.solarize, 0.0),
        ("views.crop_scale", views.crop_scale[1], 1.0),
        ("views.blur_sigma", tuple(views.blur_sigma), (0.1, 2.0)),
    )
    for key, value, needed in wanted:
        if value != needed:
            message = f"{key}: {value} is not what all contestants of a race have; set it to {needed}"
            raise UserError(message, code="not-in-common")
    if config.data.val is None or config.data.backend in ("synthetic", "ffcv"):
        message = "data.val: a race reads labelled image files; set data.val, and a data.backend that decodes"
        raise UserError(message, code="no-image-files")


class Images(NamedTuple):
    """Images of a race."""

    overrides: list[str]
    """Overrides of the config."""
    label: str
    """The folder that holds train and val, and how many classes where they are not all."""


def images_of(
    config: str, device: str, data: Path | None, train: int | None, val: int | None, lists: Path,
    classes: int | None = None,
) -> Images:  # fmt: skip
    """Returns the images of `data`, or the config's own, cut down to equally many of each class by files in `lists`.

    `classes`: of the first so many classes by name; None: of all.
    """
    if data is None:
        own = load_config(config)
        draw_missing_demo(own, print)
        folders = [Path(own.data.train or ""), Path(own.data.val or "")]
    else:
        folders = [data / "train", data / "val"]
    given = []
    for option, folder, count in (("--train", folders[0], train), ("--val", folders[1], val)):
        listed = count is not None or classes is not None
        given.append(write_list(folder, count, lists, option, classes) if listed else folder)
    paths = [f"data.train={given[0]}", f"data.val={given[1]}", "data.demo_seed=null"]
    label = folders[0].resolve().parent.name
    return Images([*paths, f"train.device={device}"], label if classes is None else f"{label}, {classes} classes")


def check_entrants(
    contestants: tuple[str, ...], seeds: int, rates: tuple[str, ...], own_rates: tuple[str, ...]
) -> None:
    """Raises `UserError` for a contestant that is unknown, and for a race without contestant, seed or rate."""
    for name in contestants:
        if name not in CONTESTANTS:
            message = f"--contestants: '{name}' is unknown; write some of {', '.join(CONTESTANTS)}"
            raise UserError(message, code="unknown-contestant")
    if seeds < 1 or not contestants or not rates or not own_rates:
        raise UserError("--seeds: a race needs a seed, a contestant and a rate; give one of each", code="empty-race")


def seconds_each(minutes_each: float | None, minutes: float, runs: int) -> float:
    """Returns how long each of `runs` trains: as asked for, or its part of `minutes` for all."""
    return round(60 * minutes_each if minutes_each else max(60 * minutes * _TRAINING_SHARE / runs, 1.0), 1)


def run(
    results: Results,
    *,
    device: torch.device,
    minutes: float,
    config: str = "quickstart",
    data: Path | None = None,
    train: int | None = None,
    val: int | None = None,
    classes: int | None = None,
    minutes_each: float | None = None,
    seeds: int = 3,
    target: float = 45.0,
    rates: tuple[str, ...] = ("0.5x", "1x", "2x"),
    own_rates: tuple[str, ...] = ("1x",),
    contestants: tuple[str, ...] = DEFAULT,
    evaluations: int = EVALUATIONS,
    solo_learn: Path | None = None,
    call=apart,
) -> None:
    """Runs the whole race, or the rest of it, then writes its standings and its plot.

    `minutes` are for all of it where `minutes_each` does not say how long a run trains.
    """
    check_entrants(contestants, seeds, rates, own_rates)
    with tempfile.TemporaryDirectory() as scratch:
        lists = (results.folder or Path(scratch)).resolve() / "images"
        images = images_of(config, device.type, data, train, val, lists, classes)
        own = load_config(config, images.overrides).optimizer.base_lr
        grids = {name: [in_words(rate, own) for rate in (own_rates if name in OURS else rates)] for name in contestants}
        count = sum(map(len, grids.values())) + (seeds - 1) * len(grids)
        seconds = seconds_each(minutes_each, minutes, count)
        checkout = solo_learn and solo_learn.resolve()
        race = Race(Lines(results), config, images, seconds, target, checkout, call, evaluations=evaluations)
        race.run(grids, seeds)
    if results.folder:
        conclude(results.folder, race.params)


def conclude(folder: Path, params: dict) -> None:
    """Say how the runs with these params stand; write standings.json and the plot."""
    lines = read(folder / f"{BENCHMARK}.jsonl")
    found = [standing for standing in standings(lines) if standing.params == params]
    found.sort(key=lambda standing: -standing.knn[0])
    for standing in found:
        seconds = plus_minus(standing.seconds, 0)
        print(
            f"{standing.variant}: kNN {plus_minus(standing.knn, 2)} % (n = {len(standing.runs)}) at base_lr "
            f"{standing.base_lr:g}; {standing.target:g} % reached by {standing.reached} of {len(standing.runs)}"
            + (f", in {seconds} s" if seconds else "")
            + f"; {standing.images_per_second:.0f} images/s"
        )
    text = json.dumps([standing.numbers() for standing in found], indent=1, allow_nan=False)
    (folder / "standings.json").write_text(text + "\n", encoding="utf-8")
    controls_of = [line for line in lines if line["kind"] == "control" and params.items() <= line["params"].items()]
    try:
        paths = plot.draw(found, controls_of, folder, BENCHMARK)
    except ImportError as error:
        message = f"--out: the plot needs matplotlib ({error}); pip install matplotlib"
        raise UserError(message, code="no-matplotlib") from error
    print(f"written: {', '.join(map(str, paths))}")


def main(argv: list[str] | None = None) -> int:
    return command(run, BENCHMARK, "Race to a kNN accuracy.", minutes=60.0, argv=argv)


if __name__ == "__main__":
    # As `fastsiam.train` sets it, here for everyone. solo-learn's imports warn in each of its workers.
    let_threads_sleep()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
