"""Reads a config: finds the file, applies overrides, checks all of it and names the run.

`load_config` turns every mistake into one sentence that names the key and the nearest right one. `differences` compares
two configs in what they compute.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastsiam.config.schema import Config
from fastsiam.config.yaml_file import apply_override, check, expand_home, flat, one_sentence, read, shortened
from fastsiam.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"

# What may differ between two starts of one run: where things lie and how they are watched, not what is computed.
OPERATIONAL = (
    "data.train", "data.val", "data.workers", "data.max_bad_fraction", "data.manifest", "data.demo_seed",
    "train.max_steps", "train.max_share", "train.log_every_steps", "train.watchdog_seconds",
    "train.checkpoint_activations",
    "evaluate.knn_every_epochs", "evaluate.controls", "collapse.action",
    "checkpoint.every_seconds", "checkpoint.keep", "run.dir", "run.name", "run.fresh",
)  # fmt: skip


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the checked config of a YAML file with overrides applied.

    `name_or_path`: a path, or the name of a file in `configs/` with or without `.yaml`. `overrides`: strings
    `section.key=value`, the value in YAML; a budget there takes the place of the file's epochs, and epochs that of its
    budget; with another data.train no demo images are drawn. Raises `UserError` (a `ValueError`) of one sentence.
    """
    try:
        return _load(name_or_path, list(overrides))
    except UserError as error:
        raise one_sentence(error) from error.__cause__


def _load(name_or_path, overrides):
    path = find_config(name_or_path)
    values = _read(path)
    demo_folder = _folder_of_demo(values)
    method = _name_of_method(values)
    overridden = {apply_override(Config, values, override) for override in overrides}
    if "method" not in overridden and _name_of_method(values) != method:
        # Another method than the file's has its own defaults.
        values["method"] = {}
        for override in overrides:
            if override.startswith("method."):
                apply_override(Config, values, override)
    _let_the_override_win(values, overridden)
    if demo_folder and demo_folder != _folder_of_demo(values) and not overridden & {"data", "data.demo_seed"}:
        # The file asks for demo images in its own folder; the user's folder must not get them.
        values["data"]["demo_seed"] = None
    config = check(Config, values)
    if config.run.name is None:
        config = _named(config, path, changed=bool(overrides))
    return config


def _read(path):
    # A section with nothing below it is null in YAML, and takes its defaults.
    return {section: values for section, values in read(path).items() if values is not None}


def find_config(name_or_path: str | Path) -> Path:
    """Returns the file that a `--config` argument names; raises `UserError` with the names that exist."""
    path = expand_home(name_or_path)
    for candidate in (path, CONFIGS / path.name, CONFIGS / f"{path.name}.yaml"):
        if os.path.isfile(candidate) and (candidate == path or path.name == str(name_or_path)):
            return candidate
    known = sorted(file.name for file in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    asked = shortened(str(name_or_path), 60)
    raise UserError(
        f"--config {asked}: no such file, and configs/ holds only {', '.join(known)}{hint}", "no-such-config"
    )


def differing_keys(one: Config, other: Config) -> list[str]:
    """Returns the keys in which two configs compute something else, as `key (a, now b)`."""
    return [f"{key} ({a}, now {b})" for key, (a, b) in differences(one, other).items()]


def differences(one: Config, other: Config) -> dict[str, tuple]:
    """Returns the dotted keys in which two configs compute something else, sorted, with both values."""
    in_lists = max(len(one.views), len(other.views)) > 1
    a, b = (flat(_dumped(config, in_lists)) for config in (one, other))
    without_effect = set() if any(group.blur for group in (*one.views, *other.views)) else {"views.blur_kind"}
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if key not in OPERATIONAL and key not in without_effect and a.get(key) != b.get(key)
    }


def _dumped(config: Config, in_lists: bool) -> dict:
    """A config as it is written; `in_lists`: with the groups of views by their numbers, as overrides name them."""
    dumped = config.model_dump(mode="json")
    if in_lists:
        views = dumped["views"]
        dumped["views"] = {
            str(number): group for number, group in enumerate(views if isinstance(views, list) else [views])
        }
    return dumped


def _let_the_override_win(values: dict, overridden: set[str]) -> None:
    train = values.get("train")
    if not isinstance(train, dict):
        return
    if "budget" in overridden and "train.epochs" not in overridden and values["budget"] is not None:
        train["epochs"] = None
    if "train.epochs" in overridden and "budget" not in overridden and train["epochs"] is not None:
        values["budget"] = None


def _name_of_method(values: dict) -> object:
    method = values.get("method")
    return method.get("name") if isinstance(method, dict) else None


def _folder_of_demo(values: dict) -> str | None:
    """Returns the folder of data.train if data.demo_seed asks for the demo images there."""
    data = values.get("data")
    if not isinstance(data, dict) or data.get("demo_seed") is None or not isinstance(data.get("train"), str):
        return None
    return os.path.normpath(os.path.expanduser(data["train"]))


def _named(config: Config, path: Path, changed: bool) -> Config:
    name = path.stem
    if changed:
        function = flat(config.model_dump(mode="json"))
        written = flat(check(Config, _read(path)).model_dump(mode="json"))
        # data.train is operational (a data set may move) but another folder is by default another run.
        kept = {k: v for k, v in function.items() if k not in OPERATIONAL or k in ("data.train", "data.val")}
        overridden = {k: v for k, v in kept.items() if k not in written or written[k] != v}
        if overridden:
            # Heads under the name of 0.1.0, so that its runs resume.
            named = {re.sub(r"^method\.(?=projector|predictor)", "model.", k): v for k, v in overridden.items()}
            name += "-" + hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    return config.with_values({"run.name": name})
