"""Training of a detector by the schedule of detectron2's configs, with checkpoints; and exact statistics after it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastsiam.errors import UserError
from fastsiam.evaluate.detection.loader import Draws, TrainingImages, sound, training_loader
from fastsiam.run import checkpoint
from fastsiam.runtime.runtime import Runtime
from fastsiam.runtime.seeding import seed_step

# detectron2's WARMUP_FACTOR: the rate begins at this share.
_WARMUP_FROM = 1 / 1000
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Schedule:
    """Iterations and learning rate."""

    iterations: int
    batch_size: int
    """Images of all ranks in an iteration."""
    lr: float = 0.02
    """At 16 images; the rate of an iteration is proportional to the batch."""
    warmup: int = 100
    steps: tuple[float, ...] = (0.75, 22 / 24)
    """Shares of the iterations after which the rate is a tenth of what it was."""
    weight_decay: float = 1e-4
    precise_bn: int = 200
    """Iterations whose mean gives the statistics of batch norm in evaluation; 0 keeps the running ones."""

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, which counts from 0."""
        rate = self.lr * self.batch_size / 16 * 0.1 ** sum(iteration >= int(s * self.iterations) for s in self.steps)
        if iteration < self.warmup:
            done = iteration / self.warmup
            rate *= _WARMUP_FROM * (1 - done) + done
        return rate


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.SGD:
    """SGD with momentum 0.9; norms are not decayed (detectron2's WEIGHT_DECAY_NORM is 0)."""
    norms = {
        id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=schedule.rate(0), momentum=0.9)


def over_all_ranks(model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model with batch norm over the images of all ranks, where they are GPUs.

    torch's layer, and not `models.batch_norm`: images and regions of detectors differ in number of pixels from rank to
    rank, and each counts by that number. It does not run on CPUs, where each rank has its own statistics.
    """
    several = runtime.world.size > 1 and runtime.device.type == "cuda"
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model


class Batches:
    """This rank's images and targets of training iterations, on its device."""

    def __init__(self, images: TrainingImages, batch_size: int, runtime: Runtime, workers: int, seed: int):
        self._images, self._batch_size, self._runtime = images, batch_size, runtime
        self._workers, self._seed = workers, seed

    def of(self, first: int, last: int) -> Iterator[tuple[list, list]]:
        """Yields those of the iterations from `first` to before `last`; torch's random state is set for each.

        Images are fp32 [3, H, W] in [0, 1]. Raises `UserError` for one that cannot be decoded.
        """
        world, device = self._runtime.world, self._runtime.device
        draws = Draws(len(self._images), self._seed, world.rank, world.size, first * self._batch_size)
        loader = iter(training_loader(self._images, self._batch_size // world.size, self._workers, draws))
        for iteration in range(first, last):
            with world.together():
                images, targets = sound(next(loader))
            # The samplers of RPN and of the heads draw by it.
            seed_step(self._seed, iteration, world.rank, device)
            images = [image.to(device, non_blocking=True).float().div_(255) for image in images]
            yield images, [{n: v.to(device, non_blocking=True) for n, v in target.items()} for target in targets]


class Training:
    """Trains a detector from iteration 0, or from a checkpoint."""

    def __init__(self, model: nn.Module, batches: Batches, schedule: Schedule, runtime: Runtime):
        self.model, self.iteration = over_all_ranks(model, runtime), 0
        self._batches, self._schedule, self._runtime = batches, schedule, runtime
        self._optimizer = build_optimizer(self.model, schedule)
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)

    def resume(self, folder: Path, settings: dict) -> bool:
        """Continues from the checkpoint in `folder`; False where there is none.

        Raises `UserError` for one of other settings, or that is damaged.
        """
        path = checkpoint.path_of(folder, 0)
        if not path.exists():
            return False
        try:
            saved = checkpoint.load(path)
        except UserError as error:
            raise UserError(f"--resume: {error}; leave --resume out to start over", error.code) from error
        then = saved.get("settings", {})
        different = [f"{key} {then.get(key)}, now {now}" for key, now in settings.items() if then.get(key) != now]
        if different:
            raise UserError(
                f"--resume: {path} was begun with other settings ({'; '.join(different)}); give those, or leave "
                "--resume out to start over",
                "other-settings",
            )
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._scaler.load_state_dict(saved["scaler"])
        self.iteration = saved["iteration"]
        return True

    def run(self, say: Callable[[str], None], save_every: float, folder: Path | None, settings: dict) -> None:
        """Trains to the end, and writes a checkpoint into `folder` every `save_every` seconds.

        Raises `UserError` for a loss that is not finite and for an image that cannot be decoded.
        """
        schedule, model = self._schedule, self._distributed()
        began = saved_at = time.perf_counter()
        first, every = self.iteration, max(1, min(100, schedule.iterations // 10))
        for images, targets in self._batches.of(self.iteration, schedule.iterations):
            losses = self._step(model, images, targets)
            self.iteration += 1
            if self.iteration % every == 0 or self.iteration == schedule.iterations:
                seconds = (time.perf_counter() - began) / (self.iteration - first)
                say(_progress(self.iteration, schedule, losses, seconds))
            if time.perf_counter() - saved_at > save_every:
                saved_at = time.perf_counter()
                self.save(say, folder, settings)

    def save(self, say: Callable[[str], None], folder: Path | None, settings: dict) -> None:
        """Writes a checkpoint; says where the disk refuses. The first rank does, and only into a folder."""
        if folder is None or not self._runtime.world.is_first:
            return
        contents = {
            "settings": settings,
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        try:
            checkpoint.save(folder, contents, keep=1)
        except checkpoint.SaveError as error:
            say(f"warning: {error}")

    def use_exact_statistics(self) -> None:
        """Gives each batch norm the mean of its statistics over `precise_bn` further batches, without training.

        Where ranks have their own statistics, all get their mean.
        """
        norms = [module for module in self.model.modules() if isinstance(module, _NORMS)]
        if self._schedule.precise_bn:
            self._average(norms)
        for norm in norms if self._runtime.world.size > 1 else ():
            for values in (norm.running_mean, norm.running_var):
                dist.all_reduce(values)
                values.div_(self._runtime.world.size)

    def _average(self, norms):
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            # torch then takes the mean of all batches.
            norm.momentum = None
        self.model.train()
        begin = self._schedule.iterations
        with torch.no_grad(), self._runtime.autocast():
            for images, targets in self._batches.of(begin, begin + self._schedule.precise_bn):
                self.model(images, targets)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    def _distributed(self):
        if self._runtime.world.size == 1:
            return self.model
        device = self._runtime.device
        return DistributedDataParallel(self.model, device_ids=[device.index] if device.type == "cuda" else None)

    def _step(self, model, images, targets):
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self.iteration)
        model.train()
        with self._runtime.autocast():
            losses = model(images, targets)
        total = sum(losses.values())
        with self._runtime.world.together():
            if not torch.isfinite(total):
                parts = ", ".join(f"{name.removeprefix('loss_')} {value.item():.3g}" for name, value in losses.items())
                raise UserError(
                    f"--lr: the loss of iteration {self.iteration + 1:,} is not finite ({parts}) at the rate "
                    f"{self._schedule.rate(self.iteration):.3g}; try a lower --lr or a longer --warmup",
                    "loss-not-finite",
                )
        self._optimizer.zero_grad()
        self._scaler.scale(total).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return {name: value.item() for name, value in losses.items()}


def fill_statistics(encoder: nn.Module, transform: nn.Module, batches: Batches, iterations: int) -> None:
    """Gives the batch norms of an untrained encoder statistics, those of some batches of training images.

    Frozen at 0 and 1, they would make it no network's. `transform`: that of a detector.
    """
    encoder.train()
    with torch.no_grad():
        for images, _ in batches.of(0, iterations):
            encoder(transform(images)[0].tensors)
    encoder.eval()


def _progress(iteration, schedule, losses, seconds):
    parts = ", ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
    minutes, seconds_left = divmod(int(seconds * (schedule.iterations - iteration)), 60)
    return (
        f"iteration {iteration:,}/{schedule.iterations:,}  loss {sum(losses.values()):.3f} ({parts})  "
        f"lr {schedule.rate(iteration - 1):.3g}  {schedule.batch_size / seconds:.1f} img/s  "
        f"ETA {minutes}:{seconds_left:02d}"
    )
