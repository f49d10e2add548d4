"""solo-learn (vturrisi/solo-learn) from a checkout: its methods' training steps, its PIL and its DALI transforms.

Its package on the registry pins an old torch, so the checkout's path is given. Only the Lightning trainer is left
out: what is timed is `training_step`, backward and the optimizer of `configure_optimizers`.
"""

import contextlib
import copy
import functools
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.peers import AbsentError, copy_linear_layers, data_loader, part, plain_encoder

NO_PATH = "give a checkout of github.com/vturrisi/solo-learn with --solo-learn PATH"
REQUIRES = "lightning omegaconf scipy timm torchmetrics tqdm"

# Batches that its DALI pipeline prepares ahead, DALI's default.
AHEAD = 2

# Epochs of its CIFAR configs, of which the shares of a run that are given in epochs are counted, and parts of a run.
EPOCHS, STEPS = 1000, 10**6
# The momentum at the end of a run, in its CIFAR configs.
FINAL_TAU = {"byol": 1.0, "moco": 0.999}

# No data set of its own table of channel statistics, so that it takes those of the augmentation's section.
OTHER_IMAGES = "custom"


def check_installed(checkout: Path | None) -> None:
    """Puts the checkout on the import path; raises `AbsentError` without one, or where it cannot be imported."""
    if checkout is None:
        raise AbsentError(NO_PATH)
    if not (checkout / "solo" / "methods" / "simsiam.py").is_file():
        raise AbsentError(f"{checkout} is not a checkout of solo-learn; {NO_PATH}")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import solo.methods.simsiam  # noqa: F401
    except ImportError as error:
        raise AbsentError(f"solo-learn does not import ({error}); pip install {REQUIRES}") from error


def build_step(
    config, weights, device, checkout, *, precision=contextlib.nullcontext, memory_format=torch.channels_last
):
    """Their method and optimizer; in channels-last as their trainer runs it.

    SimSiam's predictor keeps its rate, as their `static_lr` has it.
    """
    check_installed(checkout)
    from omegaconf import OmegaConf

    kind = _class_of(config)
    # It says that intervals of a scheduler, which is not there, matter for resuming.
    logging.disable(logging.WARNING)
    # weight_norm, which its SwAV calls, is deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = kind(OmegaConf.create(_settings(config, memory_format)))
    logging.disable(logging.NOTSET)
    _make_same_architecture(method, config, weights)
    # Without a trainer there is nothing to log to.
    method.log_dict = method.log = lambda *_, **__: None
    method.to(device, memory_format=memory_format)
    optimizer = method.configure_optimizers()
    for group in optimizer.param_groups:
        group["scheduled"] = group["name"] != "predictor" or config.method.name != "simsiam"
    # What its methods read of a trainer: their schedules count epochs, or steps of the whole run.
    trainer = SimpleNamespace(world_size=1, current_epoch=0, global_step=0, estimated_stepping_batches=STEPS)
    method.trainer = trainer
    method.on_train_start()

    def step(views):
        x = views.chunk(2)
        labels = torch.zeros(len(x[0]), dtype=torch.int64, device=device)
        batch = [torch.arange(len(x[0]), device=device), list(x), labels]
        with precision():
            loss = method.training_step(batch, 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        method.on_after_backward()
        optimizer.step()
        # The step counts as one, however small a share of the run it is.
        trainer.global_step = max(trainer.global_step, getattr(method, "last_step", 0) + 1)
        method.on_train_batch_end(None, batch, 0)
        return loss.detach()

    def before(progress):
        trainer.current_epoch, trainer.global_step = int(progress * EPOCHS), round(progress * STEPS)

    step.before = before
    step.model, step.encoder, step.optimizer = method, method.backbone, optimizer
    return step


def _class_of(config):
    """Raises `AbsentError` for a method, or a number of views, that it does not have."""
    from solo.methods import byol, mocov2plus, simclr, simsiam, swav

    kinds = {
        "simsiam": simsiam.SimSiam,
        "byol": byol.BYOL,
        "simclr": simclr.SimCLR,
        "moco": mocov2plus.MoCoV2Plus,
        "swav": swav.SwAV,
    }
    name, num_views = config.method.name, config.view_groups[0].count
    if name not in kinds or num_views != 2:
        raise AbsentError(f"solo-learn has no {name} with {num_views} views")
    return kinds[name]


def _settings(config, memory_format) -> dict:
    model, heads, optimizer = config.model, config.method, config.optimizer
    # It knows no CIFAR ResNet: `_make_same_architecture` puts one in this one's place.
    backbone = model.encoder if model.width is None else "resnet18"
    numbers = {"proj_hidden_dim": heads.projector.hidden, "proj_output_dim": heads.projector.out}
    if getattr(heads, "predictor", None):
        numbers["pred_hidden_dim"] = heads.predictor.hidden
    # Their names of our keys.
    names = {"temperature": "temperature", "queue": "queue_size", "prototypes": "num_prototypes",
             "epsilon": "sk_epsilon", "sinkhorn_iterations": "sk_iters"}  # fmt: skip
    numbers |= {theirs: getattr(heads, ours) for ours, theirs in names.items() if hasattr(heads, ours)}
    if heads.name == "swav":
        shares = {"freeze_prototypes_epochs": heads.freeze_prototypes, "epoch_queue_starts": heads.queue_from}
        numbers |= {key: round(share * EPOCHS) for key, share in shares.items()}
    return {
        "method": {"moco": "mocov2plus"}.get(heads.name, heads.name),
        "backbone": {"name": backbone, "kwargs": {"zero_init_residual": model.zero_init_residual}},
        "method_kwargs": numbers,
        "momentum": {"base_tau": getattr(heads, "momentum", 0.99), "final_tau": FINAL_TAU.get(heads.name, 1.0)},
        "data": {
            "dataset": "cifar10" if model.stem == "cifar" else "imagenet",
            "num_classes": 10 if model.stem == "cifar" else 1000,
            "num_large_crops": 2,
            "num_small_crops": 0,
        },
        "max_epochs": config.train.epochs,
        "optimizer": {
            "name": "sgd",
            "batch_size": config.train.batch_size,
            "lr": config.learning_rate,
            "classifier_lr": config.learning_rate,
            "weight_decay": optimizer.weight_decay,
            "kwargs": {"momentum": optimizer.momentum},
        },
        "scheduler": {"name": "none"},
        "performance": {"disable_channel_last": memory_format != torch.channels_last},
    }


def _make_same_architecture(method, config, weights):
    model, heads = config.model, config.method
    if model.width is not None:
        method.backbone = plain_encoder(model)
        features, hidden = method.backbone.num_features, heads.projector.hidden
        method.projector[0] = nn.Linear(features, hidden, bias=method.projector[0].bias is not None)
        method.classifier = nn.Linear(features, method.num_classes)
    elif model.stem == "cifar":
        # Theirs pads by 2, which makes 34 px of 32.
        method.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    method.backbone.load_state_dict(part(weights, "encoder"))
    if heads.name == "simsiam":
        _load_simsiam(method, heads, weights)
        return
    copy_linear_layers(method.projector, part(weights, "projector"))
    if hasattr(method, "predictor"):
        copy_linear_layers(method.predictor, part(weights, "predictor"))
    if hasattr(method, "prototypes"):
        method.prototypes.weight_v.data.copy_(weights["prototypes.weight"])
    if hasattr(method, "momentum_backbone"):
        method.momentum_backbone = copy.deepcopy(method.backbone).requires_grad_(False)
        method.momentum_projector = copy.deepcopy(method.projector).requires_grad_(False)


def _load_simsiam(method, heads, weights):
    if heads.projector.layers == 2:
        # Theirs always has three layers, the appendix's for CIFAR-10 two.
        method.projector = nn.Sequential(*method.projector[:3], *method.projector[6:])
    method.predictor.load_state_dict(part(weights, "predictor"))
    missing, unexpected = method.projector.load_state_dict(part(weights, "projector"), strict=False)
    # They freeze the bias before the last batch norm; ours is not there.
    assert not unexpected, unexpected
    assert len(missing) == 1, missing


def _augmentation(spec) -> dict:
    """Its augmentation section with the numbers of `spec` (scripts/pretrain/*/augmentations/*.yaml show the keys)."""
    return {
        "crop_size": spec.size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "rrc": {"enabled": True, "crop_min_scale": spec.crop_scale[0], "crop_max_scale": spec.crop_scale[1]},
        "color_jitter": {
            "prob": spec.jitter,
            "brightness": spec.brightness,
            "contrast": spec.contrast,
            "saturation": spec.saturation,
            "hue": spec.hue,
        },
        "grayscale": {"prob": spec.grayscale},
        "gaussian_blur": {"prob": spec.blur},
        "solarization": {"prob": 0.0},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": spec.flip},
    }


def _crops(build_transform, groups):
    """Their transform of one image to the views of all groups."""
    from omegaconf import OmegaConf
    from solo.data.pretrain_dataloader import prepare_n_crop_transform

    transforms = [build_transform(OTHER_IMAGES, OmegaConf.create(_augmentation(group.spec))) for group in groups]
    return prepare_n_crop_transform(transforms, [group.count for group in groups])


def build_loader(paths, checkout, *, groups, batch_size, workers, device):
    """Their PIL transforms with the numbers of `groups` (the crop is bicubic, as always there) in a DataLoader."""
    check_installed(checkout)
    from solo.data.pretrain_dataloader import build_transform_pipeline

    return data_loader(paths, _crops(build_transform_pipeline, groups), batch_size, workers, device)


def build_dali_loader(paths, checkout, *, groups, batch_size, workers, device):
    """Their DALI pipeline, which decodes once and augments inside the graph."""
    check_installed(checkout)
    try:
        from nvidia.dali import ops
    except ImportError as error:
        raise AbsentError("DALI is not installed; pip install nvidia-dali-cuda120") from error
    from solo.data.dali_dataloader import PretrainPipelineBuilder, build_transform_pipeline_dali

    kind = "gpu" if device.type == "cuda" else "cpu"
    builder = PretrainPipelineBuilder(
        Path(paths[0]).parents[1],
        batch_size=batch_size,
        device=kind,
        transforms=_crops(functools.partial(build_transform_pipeline_dali, dali_device=kind), groups),
        num_threads=workers,
    )
    # Its own reader takes whole folders; this one reads the files that all others read.
    builder.reader = ops.readers.File(files=list(paths), shuffle_after_epoch=True)
    pipeline = builder.pipeline(
        batch_size=batch_size, num_threads=workers, device_id=0 if kind == "gpu" else None, prefetch_queue_depth=AHEAD
    )
    pipeline.build()
    return _Views(pipeline, len(paths) // batch_size)


class _Views:
    """An epoch's batches `[x1, x2]`, at most AHEAD of them under way.

    Scheduled one by one: DALI's own iterator begins with the next epoch's while another loader is timed.
    """

    def __init__(self, pipeline, batches: int):
        self._pipeline, self._batches = pipeline, batches
        # DALI's first call schedules as many as it prepares ahead, each later one schedules one.
        self._pipeline.schedule_run()
        self._scheduled = AHEAD

    def __iter__(self):
        while self._scheduled < min(AHEAD, self._batches):
            self._schedule()
        for number in range(self._batches):
            *views, _ = self._pipeline.share_outputs()
            # DALI uses its buffers again.
            views = [torch.from_dlpack(view.as_tensor()).clone() for view in views]
            self._pipeline.release_outputs()
            self._scheduled -= 1
            if number + AHEAD < self._batches:
                self._schedule()
            yield views

    def _schedule(self):
        self._pipeline.schedule_run()
        self._scheduled += 1
