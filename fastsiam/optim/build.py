"""Parameter groups, SGD and LARS, and learning rates as pure functions of progress in [0, 1]."""

import math

import torch

from fastsiam.config import Config
from fastsiam.config.published import TABLE_2
from fastsiam.errors import MissingLibraryError, Notice, UserError
from fastsiam.optim.apex import APEX_SOURCE, find_apex
from fastsiam.optim.lars import LARS

APEX = "optimizer.implementation: apex"
# Methods whose authors train batches of 4096 with LARS.
WITH_LARS = ("byol", "simclr", "swav")


def build_optimizer(method, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` over the groups of `parameter_groups`.

    SGD decays every parameter, as in the paper. Raises `MissingLibraryError` without NVIDIA's apex, and
    `UserError` for apex with parameters that are not on a CUDA device.
    """
    settings, groups = config.optimizer, parameter_groups(method, config)
    numbers = {"lr": config.learning_rate, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    if settings.name == "lars":
        return LARS(groups, **numbers, trust=settings.lars_trust)
    if settings.implementation == "apex":
        return _apex_sgd(groups, numbers)
    return fused_sgd(groups, numbers)


def parameter_groups(method, config: Config) -> list[dict]:
    """Groups with `scheduled`: whether their rate follows the schedule, or stays (`optimizer.predictor_lr: fixed`).

    LARS splits each by `adapt`: parameters of one dimension, batch norm's and biases, are neither rescaled nor decayed,
    as in SimCLR (arXiv 2002.05709) and BYOL (arXiv 2006.07733), unless optimizer.lars_vectors is adapted. Parameters
    without a gradient, such as those of a momentum encoder, are in none.
    """
    constant = method.constant_lr_parameters() if config.optimizer.predictor_lr == "fixed" else ()
    constant = [p for p in constant if p.requires_grad]
    held = {id(parameter) for parameter in constant}
    scheduled = [p for p in method.parameters() if p.requires_grad and id(p) not in held]
    groups = [{"params": scheduled, "scheduled": True}, {"params": constant, "scheduled": False}]
    if config.optimizer.name == "lars" and config.optimizer.lars_vectors == "exempt":
        groups = [part for group in groups for part in _split_by_dimension(group)]
    return [group for group in groups if group["params"]]


def _split_by_dimension(group):
    weights = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    return [
        group | {"params": weights, "adapt": True},
        group | {"params": vectors, "adapt": False, "weight_decay": 0.0},
    ]


def fused_sgd(groups, numbers):
    """torch's fused SGD, whose momentum begins at zero.

    Left to itself it allocates momentum in its first step with `torch.empty_like`, for the kernel to fill. Where fp16
    overflows in that step the kernel fills nothing, and the next step takes the memory as it is for momentum (torch
    2.14). From zero the first step is the same to the bit: momentum * 0 + gradient.
    """
    optimizer = torch.optim.SGD(groups, **numbers, fused=True)
    if numbers["momentum"]:
        _begin_momentum(optimizer)
        # A checkpoint of step 0 may hold none.
        optimizer.register_load_state_dict_post_hook(_begin_momentum)
    return optimizer


def _begin_momentum(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _apex_sgd(groups, numbers):
    """NVIDIA's FusedSGD, which computes what torch.optim.SGD does."""
    if not all(parameter.is_cuda for group in groups for parameter in group["params"]):
        raise UserError(f"{APEX} needs a CUDA device; set optimizer.implementation=torch", "apex-needs-cuda")
    apex = find_apex()
    if apex is None:
        raise MissingLibraryError(
            f"{APEX} is not installed; build it {APEX_SOURCE}, or set optimizer.implementation=torch", "no-apex"
        )
    if not apex.is_nvidias:
        raise MissingLibraryError(
            f"{APEX} is NVIDIA's, but {apex.origin} belongs to another project of that name (it has no "
            f"apex.optimizers); uninstall it and build NVIDIA's {APEX_SOURCE}, or set optimizer.implementation=torch",
            "other-apex",
        )
    from apex.optimizers import FusedSGD

    try:
        return FusedSGD(groups, **numbers)
    except RuntimeError as error:
        # "apex.optimizers.FusedSGD requires cuda extensions"; anything else is not ours to explain.
        if "extensions" not in str(error):
            raise
        raise MissingLibraryError(
            f"{APEX} is installed without its CUDA extensions ({error}); build it {APEX_SOURCE} and APEX_CPP_EXT=1 "
            "APEX_CUDA_EXT=1, or set optimizer.implementation=torch",
            "apex-without-cuda",
        ) from error


def large_batch_warning(config: Config) -> Notice | None:
    """A warning where SimSiam's Table 2 speaks against this batch with this optimizer and warm-up, else None."""
    batch_size, warnings = config.train.batch_size, []
    if batch_size > 1024 and config.optimizer.name == "sgd":
        method = config.method.name
        recipe = f"r50_100ep_{method}_b4096.yaml" if method in WITH_LARS else "r50_100ep_b4096.yaml"
        warnings.append(
            f"with SGD SimSiam's Table 2 has {TABLE_2[2048]} % at 2048 and {TABLE_2[4096]} % at 4096 against "
            f"{TABLE_2[512]} % at 256 and 512 (ImageNet linear top-1, 100 epochs), and expects LARS to help: "
            f"optimizer.name=lars, with the rates of {recipe}"
        )
    if batch_size >= 1024 and config.optimizer.warmup == 0:
        share = round(10 / max(config.train.epochs or 100, 100), 4)
        warnings.append(
            f"from 1024 images on papers warm up over 10 epochs, and here is no warm-up: optimizer.warmup={share:g}"
        )
    return Notice(f"train.batch_size: {batch_size}; {'; '.join(warnings)}", "large-batch") if warnings else None


def scale_at(progress: float, schedule: str, warmup: float, epoch_began: float = 0.0) -> float:
    """Factor of the initial rate at `progress`, the share of the run that is done.

    `cosine_per_epoch` holds the rate that it has at `epoch_began`, the progress at the start of the epoch, as the
    paper's code does; `warmup` is the share of the run in which the rate rises linearly, and the schedule spans the
    rest.
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine_per_epoch":
        progress = max(epoch_began, warmup)
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def set_learning_rate(optimizer, config: Config, progress: float, epoch_began: float = 0.0) -> float:
    """Give each group its rate at `progress` in an epoch that began at `epoch_began`; returns the scheduled one."""
    warmup = config.optimizer.warmup
    scale = scale_at(progress, config.optimizer.schedule, warmup, epoch_began)
    held = scale_at(progress, "constant", warmup)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * (scale if group["scheduled"] else held)
    return config.learning_rate * scale
