"""Training of a classifier by labels, epoch by epoch, on this rank's part of each batch."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.data.loader import EvaluationLoader
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.classifier import Classifier
from fastsiam.evaluate.protocols.finetune_settings import MOMENTUM, Settings, factor
from fastsiam.models.batch_norm import split_statistics
from fastsiam.optim.build import fused_sgd
from fastsiam.optim.layerwise import layerwise_groups
from fastsiam.runtime.runtime import Runtime
from fastsiam.runtime.seeding import seed_step
from fastsiam.training.step import data_parallel


class FineTuning:
    """A classifier, its optimizer, and steps; all ranks hold the same weights after each."""

    def __init__(self, model: Classifier, settings: Settings, runtime: Runtime, seed: int):
        """`model` is on the device already; `seed` is for dropout, where an encoder has it.

        Raises `UserError` for batch norm that ranks cannot share.
        """
        self.model, self.settings, self.runtime, self._seed = model, settings, runtime, seed
        world = runtime.world
        model.requires_grad_(True)
        self._forward: nn.Module = model
        if world.size > 1:
            self._forward = data_parallel(split_statistics(model, 1, world.size))
        groups = layerwise_groups(
            model.encoder, model.fc, rate=settings.lr, head_rate=settings.head_lr, decay=settings.layer_decay
        )
        numbers = {"momentum": MOMENTUM, "weight_decay": settings.weight_decay, "nesterov": settings.nesterov}
        self.optimizer = fused_sgd(groups, {"lr": settings.lr, **numbers})
        self.first_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._scaler = torch.amp.GradScaler(runtime.device.type) if runtime.dtype == torch.float16 else None

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A step on this rank's images [B, 3, S, S] and labels [B] int64; its loss, which is not read back.

        Raises `UserError` where memory does not suffice.
        """
        try:
            return self._step(images, labels)
        except torch.OutOfMemoryError:
            pass
        # Outside the handler: the traceback would hold the activations of the step that did not fit.
        size = self.settings.batch_size
        text = f"--batch-size: {self.runtime.device.type} out of memory at a batch of {size:,}; set a smaller one"
        raise UserError(text, "out-of-memory")

    def _step(self, images, labels):
        self.optimizer.zero_grad()
        with self.runtime.autocast():
            logits = self._forward(images)
        loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)
        if self._scaler:
            self._scaler.scale(loss).backward()
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def epoch(
        self, number: int, batches: Iterable, steps: int, shown: Callable[[int, Callable[[], float]], None]
    ) -> float:
        """Epoch `number` of `steps` batches; returns the mean loss of all ranks.

        `shown(step, loss)` is called after each step; `loss()` waits for the device, gives the mean so far, and raises
        `UserError` where it is not finite. All ranks must call.
        """
        world = self.runtime.world
        seed_step(self._seed, number, world.rank, self.runtime.device)
        self.model.train()
        total = torch.zeros((), device=self.runtime.device, dtype=torch.float64)
        for step, batch in enumerate(batches):
            scale = factor(self.settings.schedule, number, step, steps, self.settings.epochs)
            for group, rate in zip(self.optimizer.param_groups, self.first_rates, strict=True):
                group["lr"] = rate * scale
            total += self.step(batch.views[0], batch.labels.to(total.device, non_blocking=True))
            shown(step + 1, partial(self._mean, total, step + 1, number))
        return sum(world.collect(total.item())) / world.size / steps

    def _mean(self, total, steps, epoch):
        loss = total.item() / steps
        if not math.isfinite(loss):
            raise not_finite("loss", self.settings, epoch)
        return loss

    def state_dict(self) -> dict:
        scaler = self._scaler.state_dict() if self._scaler else None
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": scaler}

    def load_state_dict(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self._scaler and saved["scaler"]:
            self._scaler.load_state_dict(saved["scaler"])


def not_finite(what: str, settings: Settings, epoch: int) -> UserError:
    """The error where training has diverged in an epoch, counted from 0."""
    fresh = ", with --fresh" if epoch else ""
    return UserError(
        f"--lr: the {what} is not finite in epoch {epoch + 1} with learning rate {settings.lr:g}, and "
        f"{settings.head_lr:g} of the new layer; set a lower --lr and --head-lr{fresh}",
        "not-finite",
    )


@torch.no_grad()
def accuracy(model: Classifier, loader: EvaluationLoader, label_of: torch.Tensor, runtime: Runtime) -> dict:
    """Top-1 and, with more than five classes, top-5 accuracy in percent; all ranks must call, each takes its part.

    `label_of`: [C_val] int64, the logit of each class of the loader's source. Images without a label do not count.
    `finite`: False where a logit is not. Raises `UserError` where no image can be decoded.
    """
    model.eval()
    source, world = loader.source, runtime.world
    labelled = np.flatnonzero(source.labels >= 0)
    part = labelled[world.share_of(len(labelled))]
    best = min(5, model.fc.out_features)
    counts = torch.zeros(4, dtype=torch.int64, device=runtime.device)
    for batch in loader.batches(part) if len(part) else ():
        with runtime.autocast():
            logits = model(batch.images)
        truth = label_of[batch.labels].to(runtime.device)[:, None]
        hits = logits.float().topk(best, dim=1).indices == truth
        counts += torch.stack(
            (hits[:, 0].sum(), hits.sum(), torch.ones_like(hits[:, 0]).sum(), (~logits.isfinite()).sum())
        )
    first, five, seen, bad = (sum(column) for column in zip(*world.collect(counts.tolist()), strict=True))
    if not seen:
        raise UserError("--val: none of its labelled images can be decoded; run fastsiam prepare scan", "no-val-images")
    top5 = {"top5": 100 * five / seen} if model.fc.out_features > 5 else {}
    return {"top1": 100 * first / seen, **top5, "images": seen, "finite": not bad}
