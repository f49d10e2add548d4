"""Parameter groups, SGD, and learning rates as pure functions of progress in [0, 1]."""

import math

import torch

from fastsiam.config import Config


def build_optimizer(method, config: Config) -> torch.optim.SGD:
    """SGD over two groups, `scheduled` and `constant` rates; weight decay on every parameter, as in the paper."""
    constant = list(method.constant_lr_parameters()) if config.optimizer.predictor_lr == "fixed" else []
    held = {id(parameter) for parameter in constant}
    scheduled = [p for p in method.parameters() if id(p) not in held]
    groups = [{"params": scheduled, "scheduled": True}]
    if constant:
        groups.append({"params": constant, "scheduled": False})
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )


def scale_at(progress: float, schedule: str, warmup: float, epochs: int) -> float:
    """What the initial rate is multiplied by at `progress`, the share of the run that is done.

    `cosine_per_epoch` holds the rate within an epoch, as the paper's code does; `warmup` is the share of the run
    in which the rate rises linearly, and the schedule spans the rest.
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine_per_epoch":
        # A progress of k / epochs in floating point may fall just below epoch k.
        progress = max(math.floor(progress * epochs + 1e-9) / epochs, warmup)
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def set_learning_rate(optimizer, config: Config, progress: float) -> float:
    """Give each group its rate at `progress`; returns the scheduled one."""
    warmup, epochs = config.optimizer.warmup, config.train.epochs
    scale = scale_at(progress, config.optimizer.schedule, warmup, epochs)
    held = scale_at(progress, "constant", warmup, epochs)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * (scale if group["scheduled"] else held)
    return config.learning_rate * scale
