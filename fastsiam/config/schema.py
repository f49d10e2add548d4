"""Sections and keys of a config, typed and checked before torch is imported."""

import functools
import os
from collections.abc import Mapping
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_serializer, field_validator, model_validator

from fastsiam.config.budget import EXAMPLES, Budget, parse_budget
from fastsiam.config.data_sections import DataConfig, PositiveFloat, PositiveInt, Section, ViewsConfig
from fastsiam.config.method_sections import HEADS, MethodConfig, check_method
from fastsiam.config.micro_batch import check_micro_batch
from fastsiam.config.model_sections import ModelConfig, OptimizerConfig
from fastsiam.config.views import ViewGroup, default_starts, sizes_at, sizes_by, spec_of, stages_of
from fastsiam.config.yaml_file import check, set_value
from fastsiam.errors import UserError


class TrainConfig(Section):
    epochs: PositiveInt | None = None
    """Epochs to train; null with a budget."""
    max_steps: PositiveInt | None = None
    """Stops the run after so many steps; the schedule still spans the epochs or the budget."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Stops the run at this share of its epochs or budget, and measures it; the schedule still spans all of them. A
    larger share resumes the run where it stopped: with epochs or images it is the run that was never stopped."""
    batch_size: Annotated[int, Field(gt=1)]
    """Images in a step over all ranks; each gives views.count views."""
    micro_batch: Annotated[int, Field(gt=1)] | None = None
    """Images that go through the network at once, over all ranks; it divides train.batch_size. null: the whole batch. A
    step sums the gradients of its micro batches, and its memory is that of one. Learning rate and schedule stay those
    of train.batch_size; batch-norm statistics are those of a micro batch, as with small batches in the paper's
    Table 2."""
    checkpoint_activations: bool = False
    """Computes the activations inside of the encoder's blocks a second time in the backward pass, in place of keeping
    them: a third more arithmetic for less memory (fastsiam/run/README.md has numbers). The function is the same, so a
    run may change it when it resumes."""
    views_grow_at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] | None = None
    """Shares of the run at which growing views (views.size=LOW..HIGH) take their second, third, ... size; null: equal
    parts of the first 80 %. Where time or energy is the budget, a size begins once its share is spent; otherwise it
    lasts whole epochs. It means nothing to views of one size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that trains. auto: cuda where torch sees a GPU, else cpu."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format of the step. auto: bf16 where the hardware multiplies it natively, else fp32. fp16 scales the loss
    (GradScaler)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: on with CUDA where Triton and a C++ compiler are found. A compiler that fails ends the run."""
    channels_last: bool = True
    """Memory format of images and convolutions; it changes the last bits of the results and the speed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the weights, the order of the images, the crops and the augmentation."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of metrics.jsonl; each of them waits for the device."""
    watchdog_seconds: PositiveFloat = 600.0
    """Seconds without a training step after which a run writes the stacks of its threads and ends with exit code 5."""

    @model_validator(mode="after")
    def micro_batches_of_one_size(self):
        check_micro_batch(self.batch_size, self.micro_batch)
        return self

    def last_step(self, total: int | None) -> int | None:
        """Returns the step at which a run ends whose whole schedule has `total` steps; None where only time or energy
        ends it.
        """
        # 0.29 x 100 is 28.999999999999996.
        of_share = None if total is None else max(1, int(self.max_share * total + 1e-6))
        return min((steps for steps in (of_share, self.max_steps) if steps), default=None)


# Nine tenths of such an average are weights of the last 2,300 steps: less than an epoch of ImageNet at batch 512.
AVERAGE_DECAY = 0.999


class EvaluateConfig(Section):
    knn_every_epochs: PositiveInt | None = None
    """Epochs between two kNN evaluations; null: only at the end."""
    knn_k: PositiveInt = 200
    """Neighbours of the kNN classifier; the paper's authors take 200."""
    knn_temperature: PositiveFloat = 0.2
    """Neighbours are weighted by exp(similarity / temperature); the paper's authors take 0.2."""
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centred evaluation crop as a share of the image's short side; 0.875 is 224 / 256."""
    controls: bool = False
    """Before training, also measure the kNN accuracy of raw pixels and of the encoder as it starts."""
    online_linear: bool = False
    """Trains a linear classifier beside the method, on detached features of its views: needs labels, no encoder pass,
    and changes nothing of the training. Its accuracy is logged, at kNN evaluations also that on data.val."""
    average: Literal["none", "ema"] = "none"
    """Weights of the encoder that kNN measures and the run exports. none: those of the last step; ema: their
    exponential moving average in fp32. Training is the same with both, and a run keeps its choice."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] = AVERAGE_DECAY
    """Share of the average that a step keeps; step t keeps at most t / (t + 9), so that a short run forgets its random
    weights. 0.999 averages about a thousand steps, which is less than an epoch of ImageNet at batch 512."""

    @model_validator(mode="after")
    def decay_of_an_average(self):
        if self.average == "none" and self.average_decay != AVERAGE_DECAY:
            raise UserError(
                f"evaluate.average_decay: {self.average_decay:g} has no effect with evaluate.average=none; set "
                f"evaluate.average=ema, or evaluate.average_decay={AVERAGE_DECAY:g}",
                "decay-without-average",
            )
        return self


class CollapseConfig(Section):
    action: Literal["stop", "warn", "off"] = "stop"
    """Reaction to a detected collapse of the outputs. stop: ends the run with exit code 3; off: does not measure."""


class CheckpointConfig(Section):
    every_seconds: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 300.0
    """Seconds between two checkpoints; .inf: only at the end, or when a signal asks for one."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of newest checkpoints to keep; with 1 a damaged file leaves none to fall back to."""


class RunConfig(Section):
    dir: str = "runs"
    """Folder that holds the run folders."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$", max_length=200)] | None = None
    """Name of the run folder; null: the config's name plus a hash of what the overrides change."""
    fresh: bool = False
    """Starts over in a new folder in place of resuming."""

    @field_validator("dir")
    @classmethod
    def home_expanded(cls, path):
        return os.path.expanduser(path)


class Config(Section):
    data: DataConfig
    views: Annotated[tuple[ViewsConfig, ...], Field(strict=False)]
    """One group of views, or a list of groups. The first group's size and normalisation serve kNN and collapse."""
    model: ModelConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    collapse: CollapseConfig = CollapseConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    budget: str | None = None
    """Limit in place of train.epochs: 2h, 45min, 10M images, 0.8kWh (by NVML) or 15USD (at budget_price_per_hour)."""
    budget_price_per_hour: PositiveFloat | None = None
    """Cost of an hour of all machines of the run, in the currency of the budget."""

    @model_validator(mode="before")
    @classmethod
    def heads_belong_to_the_method(cls, values):
        """Takes configs of fastsiam 0.1.0, which have the heads in the section model."""
        model, method = (values.get(name) for name in ("model", "method"))
        heads = {name: model[name] for name in HEADS if name in model} if isinstance(model, dict) else {}
        if not heads or not isinstance(method, dict):
            return values
        for name, given in heads.items():
            # An override of one key leaves the others as the file has them.
            below = method.get(name)
            heads[name] = {**below, **given} if isinstance(below, dict) and isinstance(given, dict) else given
        rest = {name: value for name, value in model.items() if name not in heads}
        return {**values, "model": rest, "method": {**method, **heads}}

    @field_validator("views", mode="before")
    @classmethod
    def one_group_or_a_list(cls, given):
        return given if isinstance(given, list | tuple) else [given]

    @field_validator("views")
    @classmethod
    def at_least_two_views(cls, groups):
        if sum(group.count for group in groups) < 2:
            raise UserError("views.count: one view of each image has nothing to agree with; set 2", "out-of-range")
        return groups

    @field_serializer("views", mode="wrap")
    def as_written(self, groups, dump):
        """One group without a list around it, as configs have always been."""
        dumped = dump(groups)
        return dumped[0] if len(dumped) == 1 else list(dumped)

    @field_validator("budget", mode="before")
    @classmethod
    def with_its_unit(cls, given):
        if isinstance(given, int | float):
            raise UserError(f"budget: {given} has no unit; write {EXAMPLES}", "budget-without-unit")
        return given

    @model_validator(mode="after")
    def epochs_or_a_budget(self):
        if self.budget is None and self.train.epochs is None:
            raise UserError(
                "train.epochs: null, and there is no budget; set train.epochs=100 or budget=2h", "no-epochs-no-budget"
            )
        if self.budget is not None and self.train.epochs is not None:
            raise UserError(
                f"budget: {self.budget} and train.epochs: {self.train.epochs} are both given; set one of them null",
                "epochs-and-budget",
            )
        # Its property raises for a budget that cannot be parsed.
        return self.to_spend and self

    @model_validator(mode="after")
    def each_size_has_its_start(self):
        starts, sizes = self.train.views_grow_at, max((group.sizes for group in self.views), key=len)
        # Of one size there is nothing to start: `--config quickstart views.size=64` is a config.
        if starts is None or len(sizes) == 1:
            return self
        if len(starts) != len(sizes) - 1 or list(starts) != sorted(set(starts)):
            later = ", ".join(f"{size} px" for size in sizes[1:])
            example = ", ".join(f"{start:g}" for start in default_starts(len(sizes)))
            raise UserError(
                f"train.views_grow_at: {list(starts)} is not one share for each of {later}, in order; set "
                f"train.views_grow_at=[{example}], or null for these",
                "starts-of-sizes",
            )
        return self

    @model_validator(mode="after")
    def a_method_fits_its_views(self):
        num_views = sum(group.count for group in self.views)
        check_method(self.method, num_views, self.train.batch_size, self.train.micro_batch)
        return self

    @model_validator(mode="after")
    def a_classifier_has_labels(self):
        if self.evaluate.online_linear and self.data.backend == "synthetic":
            raise UserError(
                "evaluate.online_linear: images of data.backend=synthetic have no labels; set "
                "evaluate.online_linear=false",
                "no-labels",
            )
        return self

    @model_validator(mode="after")
    def scaled_gradients_have_their_optimizer(self):
        if self.train.precision == "fp16" and self.optimizer.implementation == "apex":
            raise UserError(
                "optimizer.implementation: apex does not take the scaled gradients of train.precision=fp16; set "
                "optimizer.implementation=torch, or train.precision=bf16",
                "apex-with-fp16",
            )
        return self

    @model_validator(mode="after")
    def kernels_have_their_images(self):
        for key, unfit, fit in (("precision", "fp32", "bf16"), ("channels_last", False, "true")):
            given = getattr(self.train, key)
            if self.model.fused_pointwise and given == unfit:
                raise UserError(
                    f"model.fused_pointwise: its kernels take no images of train.{key}={str(given).lower()}; set "
                    f"model.fused_pointwise=false, or train.{key}={fit}",
                    "pointwise-without-kernels",
                )
        return self

    @functools.cached_property
    def to_spend(self) -> Budget:
        """Epochs or budget of the run, whichever is given."""
        if self.train.epochs is not None:
            return Budget("epochs", self.train.epochs, f"{self.train.epochs} epochs")
        return parse_budget(self.budget, self.budget_price_per_hour)

    @functools.cached_property
    def view_groups(self) -> tuple[ViewGroup, ...]:
        """Groups of views at their full size."""
        return tuple(ViewGroup(group.count, spec_of(group)) for group in self.views)

    @functools.cached_property
    def view_stages(self) -> tuple[tuple[int, ...], ...]:
        """Sides in pixels of the groups' views at each stage of the run; one stage where no view grows."""
        return stages_of([group.sizes for group in self.views])

    @property
    def grows_in_mid_epoch(self) -> bool:
        """True where views take their next size as soon as its share of the time or energy is spent (`sizes_by`).

        Otherwise a size lasts whole epochs (`sizes_at`).
        """
        return len(self.view_stages) > 1 and not self.to_spend.counts_steps

    def sizes_at(self, epoch: int, epoch_progress: float) -> tuple[int, ...]:
        """Sides in pixels of the groups' views in epoch number `epoch`, which begins at `epoch_progress` of the run.

        The only epoch has the full size, as a last one has.
        """
        if len(self.view_stages) == 1 or (self.budget is None and self.train.epochs == 1):
            return self.view_stages[-1]
        return sizes_at(self.view_stages, epoch, epoch_progress, self.train.views_grow_at)

    def sizes_by(self, progress: float) -> tuple[int, ...]:
        """Sides in pixels of the groups' views after `progress` of the run."""
        return sizes_by(self.view_stages, progress, self.train.views_grow_at)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the whole batch: base_lr * batch_size / 256 (paper, section 4)."""
        return self.optimizer.base_lr * self.train.batch_size / 256

    def with_values(self, values: Mapping[str, object]) -> "Config":
        """Returns a config with other values, `{"train.batch_size": 8}`, checked as those of a file are.

        Raises `UserError` as `load_config` does.
        """
        changed = self.model_dump()
        for key, value in values.items():
            set_value(Config, changed, key, value)
        return check(Config, changed)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)
