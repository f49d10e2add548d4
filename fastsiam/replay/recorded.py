"""What a run folder and its images hold for a replay; read only, without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsiam.config import Config, load_config
from fastsiam.config.yaml_file import shortened
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.open import open_source
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.run.folder import read_status
from fastsiam.run.reading import check_is_run, ending
from fastsiam.runtime.files import json_lines, read_json

_NEVER = np.iinfo(np.int64).max
_ELSEWHERE = "--data PATH names where they lie now (a relative path counts from the folder where the run was started)"


@dataclass(frozen=True)
class Recorded:
    """A run as its folder tells it, and its training images as they are now."""

    path: Path
    config: Config
    environment: dict
    """Of the last start; empty where environment.json is missing."""
    lines: list[dict]
    """Whole lines of metrics.jsonl."""
    source: ImageSource
    excluded_since: np.ndarray
    """[N] int64: finished steps when the run excluded an image, -1 for before the first step, very large for never."""

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.config.train.batch_size

    def excluded(self, step: int) -> np.ndarray:
        """[N] bool: the images that were excluded when a step was made."""
        return self.excluded_since < step

    @property
    def has_ended(self) -> bool:
        return ending(self.path) is not None

    def status_step(self) -> int:
        """Finished steps by status.json; 0 where it does not say."""
        step = read_status(self.path).get("step")
        return step if isinstance(step, int) else 0


def read_recorded(path: Path, data: str | None, warn: Callable[[str], None]) -> Recorded:
    """Reads a run folder and lists its images, at `data` where they have moved.

    `warn(sentence)`: what may make a batch differ from that of the run. Raises `UserError` for a folder that is no run,
    a run without images, and images that are gone or others.
    """
    check_is_run(path)
    config = _config(path)
    if config.data.backend == "synthetic":
        raise UserError(
            f"RUN: {path} trained on one random batch (data.backend=synthetic), which has no images to show; give a "
            "run on images",
            "synthetic-run",
        )
    config = config.with_values({"data.val": None, **({"data.train": data} if data else {})})
    environment = read_json(path / "environment.json")
    source = _images(config, path)
    _check_is_the_same(source, environment, path, config.data.train, warn)
    lines = json_lines(_bytes(path / "metrics.jsonl"))
    return Recorded(path, config, environment, lines, source, _excluded_since(source, path, lines))


def _config(path):
    try:
        return load_config(path / "config.yaml")
    except UserError as error:
        raise UserError(
            f"RUN: {path}/config.yaml is missing, damaged or of another version of fastsiam "
            f"({shortened(str(error), 100)}); give another run",
            "damaged-config",
        ) from error


def _images(config, path):
    data = config.data
    try:
        return open_source(
            data.train, scanned=data.manifest, max_bad_fraction=data.max_bad_fraction, levels=data.deep_pixels
        )
    except UserError as error:
        if error.code != "absent":
            raise
        raise UserError(
            f"--data: there is no {data.train}, the images on which {path} trained; {_ELSEWHERE}", "data-gone"
        ) from error


def _check_is_the_same(source, environment, path, place, warn):
    then = environment.get("data")
    if then is None:
        warn(f"{path}/environment.json does not say which images the run had, so they are not compared with {place}")
    elif then != source.fingerprint():
        count = environment.get("train_images", "?")
        raise UserError(
            f"--data: {place} has changed since {path} trained on it ({count} images then, {len(source)} now; names "
            f"and sizes of the files are compared); bring the files back, or {_ELSEWHERE}",
            "other-data",
        )
    elif source.excluded_by_scan and source.excluded_by_scan not in environment.get("excluded", []):
        warn(f"the images are scanned since the run began, and what the scan excludes may differ from what the run "
             f"had: {source.excluded_by_scan}")  # fmt: skip


def _excluded_since(source, path, lines):
    """When each image was excluded. A line that a resumption has cut off leaves the image excluded from the start."""
    since = np.where(source.kinds >= UNREADABLE, -1, _NEVER)
    steps = {
        str(line.get("message", "")).replace("\n", " "): line.get("step", -1)
        for line in lines
        if line.get("kind") == "bad_file"
    }
    rows = [row.partition(b"\t") for row in _bytes(path / "skip.tsv").splitlines()]
    # Images are looked up once: names are an array of a million and more.
    places = {name: index for index, name in enumerate(source.names.tolist())} if rows else {}
    for name, _, reason in rows:
        if name in places:
            since[places[name]] = min(since[places[name]], steps.get(reason.decode(errors="backslashreplace"), -1))
    return since


def _bytes(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(
            f"RUN: cannot read {path} ({error.strerror or error}); check its permissions", "run-unreadable"
        ) from error
