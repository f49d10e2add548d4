"""lightly's building blocks (lightly-ai/lightly) put together as its examples do: eager fp32, a call for each view."""

import contextlib

import torch

from benchmarks.peers import AbsentError, data_loader, part, plain_encoder

ABSENT = "lightly is not installed; pip install lightly"


def check_installed() -> None:
    """Raises `AbsentError` unless lightly can be imported."""
    try:
        import lightly.loss
        import lightly.models.modules
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        raise AbsentError(f"{ABSENT} ({error})") from error


def build_step(config, weights, device, *, precision=contextlib.nullcontext, memory_format=torch.contiguous_format):
    """Their heads and losses on the plain encoder; `precision` and `memory_format` as for the authors' step.

    One rate for all parameters, the predictor's included, as in their examples and their CIFAR-10 benchmark.
    """
    check_installed()
    from benchmarks.peers.lightly_methods import build_module

    encoder = plain_encoder(config.model)
    encoder.load_state_dict(part(weights, "encoder"))
    model = build_module(config.method, encoder, weights, config.view_groups[0].count)
    model = model.to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.requires_grad], "scheduled": True}],
        lr=config.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )

    def step(views):
        with precision():
            loss = model(views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step.model, step.encoder, step.optimizer = model, encoder, optimizer
    return step


def build_loader(paths, *, groups, batch_size, workers, device):
    """Their view of SimSiam with the numbers of `groups`, whose crops go up to the whole image, in a DataLoader."""
    check_installed()
    from lightly.transforms.multi_view_transform import MultiViewTransform
    from lightly.transforms.simsiam_transform import SimSiamViewTransform

    ((count, spec),) = groups
    assert spec.crop_scale[1] == 1, spec.crop_scale
    view = SimSiamViewTransform(
        input_size=spec.size,
        cj_prob=spec.jitter,
        cj_bright=spec.brightness,
        cj_contrast=spec.contrast,
        cj_sat=spec.saturation,
        cj_hue=spec.hue,
        min_scale=spec.crop_scale[0],
        random_gray_scale=spec.grayscale,
        gaussian_blur=spec.blur,
        sigmas=spec.blur_sigma,
        hf_prob=spec.flip,
        normalize={"mean": list(spec.mean), "std": list(spec.std)},
    )
    # One view twice is their SimSiamTransform.
    return data_loader(paths, MultiViewTransform([view] * count), batch_size, workers, device)
