"""Compares the weights of two commits: `python -m benchmarks.same_weights BEFORE [AFTER]`.

Trains a tiny quickstart in a checkout of each, in fp32 on the CPU with one thread and without compilation, and compares
every tensor of the last checkpoint and of encoder.safetensors bit for bit. A case of BEFORE that stopped after 23 of 40
steps is resumed by AFTER and compared with BEFORE's undisturbed run. Uses only the command line, the config keys and
the files of a run folder, so that the modules of two commits may differ.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.harness.checkout import CHECKOUT

CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS = 10, 8, 2
# Ten steps an epoch; the stop is in the middle of the third.
SETTINGS = (
    "model.width=8",
    "model.projector={layers: 2, hidden: 16, out: 16}",
    "model.predictor.hidden=8",
    "train.batch_size=8",
    "train.epochs=4",
    "train.device=cpu",
    "train.precision=fp32",
    "train.compile=off",
    "train.log_every_steps=10",
    # Ends a run that hangs.
    "train.watchdog_seconds=120",
    "evaluate.knn_every_epochs=2",
    "collapse.action=off",
    "data.demo_seed=null",
)
STOP_AT = 23
RANDOM_STATE = "checkpoint.pt/random"
SIDES = ("before", "after")


@dataclass(frozen=True)
class Case:
    """Settings of one comparison."""

    backend: str
    grows: bool = False
    ranks: int = 1

    @property
    def name(self) -> str:
        return self.backend + "-growing" * self.grows + f"-{self.ranks}-ranks" * (self.ranks > 1)


_ALL = [(backend, 1) for backend in ("dali", "pil", "resident")] + [(backend, 2) for backend in ("dali", "pil")]
CASES = {
    case.name: case for case in (Case(backend, grows, ranks) for backend, ranks in _ALL for grows in (False, True))
}


@dataclass(frozen=True)
class Trainer:
    """Runs the training command of one checkout."""

    checkout: Path
    images: Path
    cache: Path

    def train(self, case: Case, folder: Path, max_steps: int | None = None) -> None:
        """Train into the run folder `folder`, or resume it; raises `subprocess.CalledProcessError`."""
        overrides = (
            *SETTINGS,
            f"data.backend={case.backend}",
            # PIL's workers are processes, which are slow to start; DALI's are threads.
            f"data.workers={int(case.backend != 'pil')}",
            f"data.store_size={64 if case.backend == 'resident' else 'null'}",
            f"data.train={self.images}/train",
            f"data.val={self.images}/val",
            f"views.size={'16..32' if case.grows else 16}",
            f"train.max_steps={max_steps or 'null'}",
            f"run.dir={folder.parent}",
            f"run.name={folder.name}",
        )
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks))
        command = [sys.executable, *(launcher if case.ranks > 1 else ()), "-m", "fastsiam.train"]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.checkout), "XDG_CACHE_HOME": str(self.cache)}
        subprocess.run(
            [*command, "--config", "quickstart.yaml", *overrides],
            cwd=self.checkout, env=os.environ | settings, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def check_out(commit: str, folder: Path) -> Path:
    """Write the files of a commit into the new folder `folder`, and return it."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryFile() as file:
        subprocess.run(["git", "-C", str(CHECKOUT), "archive", "--format=tar", commit], stdout=file, check=True)
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(folder, filter="data")
    return folder


def draw_images(folder: Path) -> Path:
    """Write `train` and `val`, smooth random images of 33 to 90 px: mostly JPEGs, some grey, some PNGs."""
    if folder.exists():
        return folder
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for number in range(CLASSES * (TRAIN_PER_CLASS + VAL_PER_CLASS)):
        rng = np.random.default_rng(number)
        part = "train" if number < CLASSES * TRAIN_PER_CLASS else "val"
        path = partial / part / f"class{number % CLASSES}" / f"{number:03d}.{'png' if number % 11 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        image = image.resize(tuple(rng.integers(33, 91, 2).tolist()), Image.Resampling.BICUBIC)
        image.convert("L" if number % 7 == 0 else "RGB").save(path, quality=95)
    partial.rename(folder)
    return folder


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint and of the encoder in a run folder, by file and place in it."""
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    encoder = load_file(run / "encoder.safetensors")
    return dict([*_leaves("checkpoint.pt", checkpoint), *_leaves("encoder.safetensors", encoder)])


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, str | None]:
    """Return for the name of each tensor how dtype, shape or bits differ, or None where they are identical."""
    return {name: _difference(before.get(name), after.get(name)) for name in before | after}


def _leaves(place: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{place}/{key}", part)


def _difference(before: torch.Tensor | None, after: torch.Tensor | None) -> str | None:
    if before is None or after is None:
        return f"is missing {'before' if before is None else 'after'}"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"was {before.dtype} {tuple(before.shape)}, is {after.dtype} {tuple(after.shape)}"
    # As bytes, so that NaN equals itself and -0.0 differs from 0.0.
    if torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (before, after))):
        return None
    return f"differs, max abs difference {(before.double() - after.double()).abs().max().item():.2g}"


def run_case(case: Case, before: Trainer, after: Trainer, kept: Path, runs: Path) -> dict[str, dict[str, str | None]]:
    """Train a case on both sides, and return what `compare` finds by the name of the comparison.

    AFTER also resumes what BEFORE has stopped where views grow.
    """
    whole = tensors_of(_kept(before, case, kept / case.name))
    after.train(case, runs / case.name)
    results = {case.name: compare(whole, tensors_of(runs / case.name))}
    if case.grows:
        stopped = _kept(before, case, kept / f"{case.name}-stopped", STOP_AT)
        run = shutil.copytree(stopped, runs / stopped.name)
        after.train(case, run)
        # The state of torch's generator counts the starts of PIL's DataLoader, of which a resumed run has one more.
        both = ({k: v for k, v in tensors.items() if k != RANDOM_STATE} for tensors in (whole, tensors_of(run)))
        results[f"{case.name}-resumed"] = compare(*both)
    return results


def _kept(trainer: Trainer, case: Case, folder: Path, max_steps: int | None = None) -> Path:
    """Return the run folder `folder`, trained now unless it exists; a killed run leaves none."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            trainer.train(case, Path(partial) / "run", max_steps)
            (Path(partial) / "run").rename(folder)
    return folder


def _full_name(commit: str) -> str:
    """Return the 40 hex digits of a commit."""
    return subprocess.check_output(["git", "-C", str(CHECKOUT), "rev-parse", commit + "^{commit}"], text=True).strip()


def main(argv: list[str] | None = None) -> int:
    """Print a line per comparison; return 1 where a tensor differs or a run fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_weights", description=__doc__.partition("\n")[0])
    parser.add_argument("before", help="commit")
    parser.add_argument("after", nargs="?", help="commit; the working tree without it")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=f"cases, of {', '.join(CASES)}")
    parser.add_argument("--keep", type=Path, help="folder for the runs of BEFORE, which are made once for each commit")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (%(default)s)")
    arguments = parser.parse_args(argv)
    names = {side: commit and _full_name(commit) for side, commit in vars(arguments).items() if side in SIDES}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        temporary = Path(name)
        keep = arguments.keep.resolve() if arguments.keep else temporary / "keep"
        # Excludes kept runs of other settings or of another torch.
        digest = hashlib.sha256(repr((SETTINGS, STOP_AT, torch.__version__)).encode()).hexdigest()[:8]
        kept, runs = keep / f"{names['before'][:12]}-{digest}", temporary / "runs"
        kept.mkdir(parents=True, exist_ok=True)
        runs.mkdir()
        images = draw_images(keep / "images")
        trainers = []
        for side in SIDES:
            tree = check_out(names[side], temporary / side) if names[side] else CHECKOUT
            trainers.append(Trainer(tree, images, temporary / f"{side}-cache"))
        started = {name: pool.submit(run_case, CASES[name], *trainers, kept, runs) for name in arguments.only or CASES}
        same = [_is_same(*case) for case in started.items()]
    return 0 if all(same) else 1


def _is_same(name: str, case: Future) -> bool:
    """Print a line for each comparison of a case when it ends; False where a tensor differs."""
    try:
        results = case.result()
    except subprocess.CalledProcessError as error:
        print(f"{name:30}failed: {error.output.strip()[-600:]}", flush=True)
        return False
    for compared, found in results.items():
        differing = [f"{tensor} {difference}" for tensor, difference in found.items() if difference]
        counted = f"{len(found) - len(differing)} of {len(found)} tensors identical"
        print(f"{compared:30}" + "; first: ".join([counted, *differing[:1]]), flush=True)
    return not any(difference for found in results.values() for difference in found.values())


if __name__ == "__main__":
    sys.exit(main())
