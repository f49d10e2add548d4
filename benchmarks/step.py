"""Images per second of the whole training step: from the authors' to ours one switch at a time, then the peers.

Views are the synthetic backend's. The row `fastsiam` is the product's own loop: schedule, step, log and checks. fp32
rows run with torch's defaults, so a GPU convolves them in TF32.
"""

import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.harness.cli import command
from benchmarks.harness.flops import flops_per_image
from benchmarks.harness.product import ProductRun
from benchmarks.harness.results import Results
from benchmarks.harness.timing import MIN_ROUNDS, Samples, count_launches, interleave, peak_memory, timed
from benchmarks.harness.worker_process import Aside
from benchmarks.peers import AbsentError, lightly, solo_learn
from benchmarks.variants.step import Inputs, Switches, ablation, build_ablated, initial_weights, product
from fastsiam.config import Config, load_config
from fastsiam.errors import UserError
from fastsiam.runtime import malloc
from fastsiam.runtime.device import autocast, choose_precision

# Config and batch: ImageNet's ResNet-50 at 224 px, CIFAR-10's ResNet-18 at 32 px.
SETTINGS = {
    "cpu": (("r18_cifar10_800ep", 128), ("r50_100ep", 16)),
    "cuda": (("r50_100ep", 512), ("r18_cifar10_800ep", 512)),
}
# Images/s that an H200 can reach on ResNet-50 at 224 px and two views, by what is fused, each tensor through memory
# once a pass: derived from 790 TFLOP/s (bf16 product) and 4.3 TB/s (copy). L0: eager channels-last; L1: torch.compile;
# L4: batch norm inside the convolutions, as MLPerf's stack has it; L6: every tensor touched once a layer.
H200_ROOFLINES = {"L0": 4092, "L1": 4881, "L4": 7362, "L6": 10149}
# Several steps a sample on a GPU: in training the host enqueues the next step while the device computes.
CALLS = {"cuda": 5, "cpu": 1}
WARMUP, REPEATS = 1, 10
# Rough, and used only to tell whether a row fits into the time; ResNet-18 takes 70 s on two cores.
COMPILE_SECONDS = {None: 0, "default": 90, "reduce-overhead": 90, "max-autotune-no-cudagraphs": 400}
GRAPHS = "reduce-overhead"


@dataclass
class Row:
    """One line of the table; `build()` gives the step, on a model of its own, as a function of the input set's number.

    It raises `AbsentError` for what cannot run here.
    """

    name: str
    switches: Switches
    build: Callable
    needed: bool = False
    """Measured even where the time is too short for every row."""
    step: Callable | None = None
    first_step_seconds: float | None = None
    step_seconds: float = 0.0


class Setting:
    """Setting of one table: a config on a device, with what its rows share."""

    def __init__(self, config: Config, device: torch.device, checkout: Path | None):
        self.config, self.device, self.checkout = config, device, checkout
        self.dtype = choose_precision(config.train.precision, device)
        self.weights = initial_weights(config, device)
        self.inputs = Inputs(config, device)
        self.flops = flops_per_image(config)
        self.params = {
            "encoder": config.model.encoder,
            "size": config.views[0].full_size,
            "batch": config.train.batch_size,
        }

    def rows(self, stack: contextlib.ExitStack) -> list[Row]:
        """Returns rows in the table's order; what their steps hold open is closed with `stack`.

        What the allocator has once kept it uses again, whatever it is told then: rows that keep freed memory run in a
        process of their own, which takes its turns.
        """
        rows = self.rows_here(stack)
        kept = [row for row in rows if row.switches.memory == "kept"]
        if kept:
            aside = stack.enter_context(Aside(_serve_kept, self.config, self.checkout))
        for row in kept:
            row.build = functools.partial(aside.bind, row.name)
        return rows

    def rows_here(self, stack: contextlib.ExitStack) -> list[Row]:
        """Returns the same rows, all of them in this process."""
        ours = product(self.device, self.dtype)
        plain = Switches(forward="lightly")
        fast = replace(plain, precision=ours.precision, channels_last=True)
        # Its own configs ask for mixed precision and channels-last.
        solo = replace(fast, forward="solo-learn")
        rows = []
        for name, switches in ablation(self.device, self.dtype).items():
            build = functools.partial(build_ablated, switches, self.config, self.weights, self.device)
            rows.append(self._row(name, switches, build, needed=name == "authors"))
        rows.append(Row("fastsiam", ours, lambda: stack.enter_context(ProductRun(self.config)), needed=True))
        rows.append(self._peer("lightly", plain, lightly.build_step))
        if fast.precision == "bf16":
            rows.append(self._peer("lightly + bf16 + channels-last", fast, lightly.build_step, needed=False))
        rows.append(self._peer("solo-learn", solo, solo_learn.build_step, self.checkout))
        return rows

    def _row(self, name, switches, build_step, needed):
        def build():
            step, views = build_step(), self.inputs.of(switches)
            return lambda index: step(views[index % len(views)])

        return Row(name, switches, build, needed)

    def _peer(self, name, switches, build_step, *more, needed=True):
        precision = autocast(self.device, torch.bfloat16 if switches.precision == "bf16" else torch.float32)
        memory_format = torch.channels_last if switches.channels_last else torch.contiguous_format
        numbers = {"precision": precision, "memory_format": memory_format}
        build = functools.partial(build_step, self.config, self.weights, self.device, *more, **numbers)
        return self._row(name, switches, build, needed)

    def numbers(self, row: Row, images_per_second: float) -> dict:
        """Returns the numbers of a line besides its time."""
        h200 = self.device.type == "cuda" and "H200" in torch.cuda.get_device_name(self.device)
        rooflines = h200 and (self.params["encoder"], self.params["size"]) == ("resnet50", 224)
        call = functools.partial(row.step, 0)
        return {
            "images_per_second": images_per_second,
            "flops_per_image": self.flops,
            "teraflops_per_second": images_per_second * self.flops / 1e12,
            **{
                f"share_of_{level}": images_per_second / limit if rooflines else None
                for level, limit in H200_ROOFLINES.items()
            },
            "first_step_seconds": row.first_step_seconds,
            "peak_memory_bytes": peak_memory(call, self.device),
            "launches": count_launches(call, self.device),
            "switches": asdict(row.switches),
        }


def _serve_kept(name: str, config: Config, checkout: Path | None, stack: contextlib.ExitStack) -> Callable[[int], None]:
    """Builds the row of this name in the process aside, on a CPU."""
    malloc.keep_freed()
    rows = Setting(config, torch.device("cpu"), checkout).rows_here(stack)
    return next(row for row in rows if row.name == name).build()


def measure(results: Results, setting: Setting, seconds: float, wanted: tuple[str, ...] = ()) -> None:
    """Builds what fits into the time, runs its rows in turns, and writes their lines.

    `wanted`: these rows alone, each of them built whatever the time.
    """
    deadline = time.perf_counter() + seconds
    with contextlib.ExitStack() as stack:
        rows = chosen(setting.rows(stack), wanted)
        together = [row for row in rows if row.switches.compile != GRAPHS]
        if together:
            absent = prepare(setting, together, deadline)
            taken = run_in_turns(setting, together, deadline)
            for row in together:
                write(results, setting, row, taken.get(row.name), absent)
    free(rows)
    graphs = [row for row in rows if row.switches.compile == GRAPHS]
    if graphs:
        measure_graphs(results, setting, graphs, deadline)


def chosen(rows: list[Row], wanted: tuple[str, ...]) -> list[Row]:
    """Returns the rows of these names, or all where none is named; raises `UserError` for an unknown name."""
    unknown = [name for name in wanted if name not in {row.name for row in rows}]
    if unknown:
        known = "; ".join(row.name for row in rows)
        raise UserError(f"--rows: {'; '.join(unknown)} is not a row; write some of {known}", code="unknown-row")
    rows = [row for row in rows if not wanted or row.name in wanted]
    for row in rows:
        row.needed |= bool(wanted)
    return rows


def measure_graphs(results: Results, setting: Setting, graphs: list[Row], deadline: float) -> None:
    """CUDA graphs keep a step's activations for good, beside which the authors' fp32 step does not fit: a second turn.

    `fastsiam` runs again as what they are compared with; its rate here goes with their lines.
    """
    with contextlib.ExitStack() as stack:
        anchor = next(row for row in setting.rows(stack) if row.name == "fastsiam")
        absent = prepare(setting, [anchor, *graphs], deadline)
        taken = run_in_turns(setting, [anchor, *graphs], deadline)
        beside = setting.params["batch"] / taken["fastsiam"].median
        for row in graphs:
            write(results, setting, row, taken.get(row.name), absent, fastsiam_images_per_second=beside)
    free([anchor, *graphs])


def prepare(setting: Setting, rows: list[Row], deadline: float) -> dict[str, str]:
    """Builds rows and runs two steps of each, the needed ones first; returns why the others are absent."""
    absent, rounds = {}, WARMUP + MIN_ROUNDS * CALLS[setting.device.type]
    order = sorted(rows, key=lambda row: (not row.needed, COMPILE_SECONDS[row.switches.compile]))
    for row in order:
        compile_seconds = COMPILE_SECONDS[row.switches.compile]
        longest = max(other.step_seconds for other in rows)
        planned = rounds * sum(other.step_seconds for other in rows) + (rounds + 2) * longest + compile_seconds
        if not row.needed and time.perf_counter() + planned > deadline:
            absent[row.name] = "the time was too short; give more --minutes"
            continue
        try:
            row.step = row.build()
        except AbsentError as error:
            absent[row.name] = str(error)
            continue
        row.first_step_seconds = timed(functools.partial(row.step, 0), setting.device)
        row.step_seconds = row.first_step_seconds
        if row.switches.compile or setting.device.type == "cuda":
            row.step_seconds = timed(functools.partial(row.step, 1), setting.device)
    return absent


def run_in_turns(setting: Setting, rows: list[Row], deadline: float) -> dict[str, Samples]:
    """Seconds per step of every row that was built."""
    return interleave(
        {row.name: row.step for row in rows if row.step is not None},
        device=setting.device,
        warmup=WARMUP,
        repeats=REPEATS,
        calls=CALLS[setting.device.type],
        seconds=max(deadline - time.perf_counter(), 0),
        hide_enqueue=False,
    )


def write(results: Results, setting: Setting, row: Row, samples: Samples | None, absent: dict, **more) -> None:
    if samples is None:
        results.add("step", row.name, setting.params, None, absent=absent[row.name], switches=asdict(row.switches))
    else:
        numbers = setting.numbers(row, setting.params["batch"] / samples.median)
        results.add("step", row.name, setting.params, samples, **numbers, **more)


def free(rows: list[Row]) -> None:
    """Frees the models, what was compiled for them, and the allocator's cache."""
    for row in rows:
        row.step = None
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def run(
    results: Results,
    *,
    device: torch.device,
    minutes: float,
    config: str | None = None,
    batch: int | None = None,
    rows: tuple[str, ...] = (),
    solo_learn: Path | None = None,
) -> None:
    """Every setting of the device, or one, within about `minutes`; rows that do not fit are written as absent.

    `config` and `batch` choose another setting than SETTINGS, `rows` some of its rows, which are all built.
    That the authors' step is ours in eager fp32 is a test, for it takes minutes on a CPU.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda"
    deadline = time.perf_counter() + 60 * minutes
    settings = [(name, size) for name, size in SETTINGS[device.type] if config in (None, name)] or [(config, None)]
    for number, (name, batch_size) in enumerate(settings):
        overrides = [f"train.device={device.type}", "data.backend=synthetic"]
        if batch or batch_size:
            overrides.append(f"train.batch_size={batch or batch_size}")
        share = (deadline - time.perf_counter()) / (len(settings) - number)
        measure(results, Setting(load_config(name, overrides), device, solo_learn), share, rows)


if __name__ == "__main__":
    sys.exit(command(run, "step", "Time the training step.", minutes=10.0))
