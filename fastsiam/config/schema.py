"""Every knob of a run, typed and checked before torch is imported.

One YAML holds a whole run. `load_config` reads it, applies `key.sub=value` overrides through the same checks,
and answers every mistake with one sentence that names the key and the nearest right one.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from fastsiam.config.budget import EXAMPLES, Budget, parse_budget
from fastsiam.config.data_sections import DataConfig, PositiveFloat, PositiveInt, Section, ViewsConfig
from fastsiam.config.model_sections import MethodConfig, ModelConfig, OptimizerConfig
from fastsiam.config.yaml_file import apply_override, check, expand_home, flat, one_sentence, read, shortened
from fastsiam.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


class TrainConfig(Section):
    epochs: PositiveInt | None
    """null where there is a budget."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps; the schedule still spans the epochs or the budget."""
    batch_size: Annotated[int, Field(gt=1)]
    """Images in a step over all processes; each gives views.count views."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, else fp32. fp16 scales the loss (GradScaler)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: on with CUDA, off on the CPU."""
    channels_last: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every_steps: PositiveInt = 50
    watchdog_seconds: PositiveFloat = 600.0
    """A run that comes to no step for so long writes the stacks of all its threads and ends with exit code 5."""


class EvaluateConfig(Section):
    knn_every_epochs: PositiveInt | None = None
    """kNN at every so many epochs; null: only at the end."""
    knn_k: PositiveInt = 200
    knn_temperature: PositiveFloat = 0.2
    """200 neighbours weighted by exp(sim / 0.2) is the setting of the paper's authors."""
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centred evaluation crop as a share of the image's short side (224 / 256 = 0.875)."""
    controls: bool = False
    """Before training, kNN of raw pixels and of the untrained encoder with filled batch-norm statistics."""


class CollapseConfig(Section):
    action: Literal["stop", "warn", "off"] = "stop"


class CheckpointConfig(Section):
    every_seconds: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 300.0
    """.inf: only at the end, or when a signal asks for it."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints stay; with 1 a damaged file leaves none to fall back to."""


class RunConfig(Section):
    dir: str = "runs"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$", max_length=200)] | None = None
    """Folder under run.dir; null: the config's name plus a hash of what the overrides change."""
    fresh: bool = False
    """Start over in a new folder."""

    @field_validator("dir")
    @classmethod
    def home_expanded(cls, path):
        return os.path.expanduser(path)


class Config(Section):
    data: DataConfig
    views: ViewsConfig
    model: ModelConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    collapse: CollapseConfig = CollapseConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig
    budget: str | None = None
    """Instead of train.epochs: 2h, 45min, 10M images, 0.8kWh (NVML's), 15USD (hours times budget_price_per_hour)."""
    budget_price_per_hour: PositiveFloat | None = None
    """What an hour of all machines of the run costs, in the currency of the budget."""

    @field_validator("budget", mode="before")
    @classmethod
    def with_its_unit(cls, given):
        if isinstance(given, int | float):
            raise ValueError(f"budget: {given} has no unit; write {EXAMPLES}")
        return given

    @model_validator(mode="after")
    def epochs_or_a_budget(self):
        if self.budget is not None:
            parse_budget(self.budget, self.budget_price_per_hour)
            if self.train.epochs is not None:
                raise ValueError(
                    f"budget: {self.budget} and train.epochs: {self.train.epochs} are both given; set one of them null"
                )
        elif self.train.epochs is None:
            raise ValueError("train.epochs: null, and there is no budget; set train.epochs=100 or budget=2h")
        return self

    @model_validator(mode="after")
    def scaled_gradients_have_their_optimizer(self):
        if self.train.precision == "fp16" and self.optimizer.implementation == "apex":
            raise ValueError(
                "optimizer.implementation: apex does not take the scaled gradients of train.precision=fp16; set "
                "optimizer.implementation=torch, or train.precision=bf16"
            )
        return self

    @property
    def to_spend(self) -> Budget:
        """The epochs or the budget, whichever is given."""
        if self.train.epochs is not None:
            return Budget("epochs", self.train.epochs, f"{self.train.epochs} epochs")
        return parse_budget(self.budget, self.budget_price_per_hour)

    @property
    def learning_rate(self) -> float:
        """The rate of the whole batch: base_lr * batch_size / 256 (paper, section 4)."""
        return self.optimizer.base_lr * self.train.batch_size / 256

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


# What may differ between two starts of one run: where things lie and how they are watched, not what is computed.
OPERATIONAL = (
    "data.train",
    "data.val",
    "data.workers",
    "data.max_bad_fraction",
    "data.manifest",
    "data.demo_seed",
    "train.max_steps",
    "train.log_every_steps",
    "train.watchdog_seconds",
    "evaluate.knn_every_epochs",
    "evaluate.controls",
    "collapse.action",
    "checkpoint.every_seconds",
    "checkpoint.keep",
    "run.dir",
    "run.name",
    "run.fresh",
)


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The checked configuration of a YAML file with overrides applied.

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
    values = read(path)
    demo_folder = _folder_of_demo(values)
    for override in overrides:
        apply_override(Config, values, override)
    overridden = {override.partition("=")[0] for override in overrides}
    _let_the_override_win(values, overridden)
    if demo_folder and demo_folder != _folder_of_demo(values) and not overridden & {"data", "data.demo_seed"}:
        # The file asks for demo images in its own folder, not in that of somebody's images.
        values["data"]["demo_seed"] = None
    if not values.get("run"):
        values["run"] = {}
    config = check(Config, values)
    if config.run.name is None:
        config = _named(config, path, changed=bool(overrides))
    return config


def find_config(name_or_path: str | Path) -> Path:
    """The file that a `--config` argument means; raises `UserError` with the names that exist."""
    path = expand_home(name_or_path)
    for candidate in (path, CONFIGS / path.name, CONFIGS / f"{path.name}.yaml"):
        if os.path.isfile(candidate) and (candidate == path or path.name == str(name_or_path)):
            return candidate
    known = sorted(file.name for file in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    asked = shortened(str(name_or_path), 60)
    raise UserError(f"--config {asked}: no such file, and configs/ holds only {', '.join(known)}{hint}")


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configs compute something else, as `key (a, now b)`."""
    return [f"{key} ({a}, now {b})" for key, (a, b) in differences(one, other).items()]


def differences(one: Config, other: Config) -> dict[str, tuple]:
    """Dotted keys in which two configs compute something else, sorted, with both values."""
    a, b = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    without_effect = {"views.blur_kind"} if not one.views.blur and not other.views.blur else set()
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if key not in OPERATIONAL and key not in without_effect and a.get(key) != b.get(key)
    }


def _let_the_override_win(values: dict, overridden: set[str]) -> None:
    train = values.get("train")
    if not isinstance(train, dict):
        return
    if "budget" in overridden and "train.epochs" not in overridden and values["budget"] is not None:
        train["epochs"] = None
    if "train.epochs" in overridden and "budget" not in overridden and train["epochs"] is not None:
        values["budget"] = None


def _folder_of_demo(values: dict) -> str | None:
    """Where data.train is, if data.demo_seed asks for the demo images there."""
    data = values.get("data")
    if not isinstance(data, dict) or data.get("demo_seed") is None or not isinstance(data.get("train"), str):
        return None
    return os.path.normpath(os.path.expanduser(data["train"]))


def _named(config: Config, path: Path, changed: bool) -> Config:
    name = path.stem
    if changed:
        function = flat(config.model_dump(mode="json"))
        written = flat(check(Config, {"run": {}, **read(path)}).model_dump(mode="json"))
        # data.train is operational (a data set may move) but another folder is by default another run.
        kept = {k: v for k, v in function.items() if k not in OPERATIONAL or k in ("data.train", "data.val")}
        overridden = {k: v for k, v in kept.items() if written.get(k, v) != v}
        if overridden:
            name += "-" + hashlib.sha256(json.dumps(overridden, sort_keys=True).encode()).hexdigest()[:8]
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
