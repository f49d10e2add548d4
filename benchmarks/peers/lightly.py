"""lightly's building blocks (lightly-ai/lightly) put together as its SimSiam example does: eager fp32, two calls."""

import contextlib
from itertools import pairwise

import torch
from torch import nn

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
    """Their heads and loss on the plain encoder; `precision` and `memory_format` as for the authors' step.

    One rate for all parameters, the predictor's included, as in their example and their CIFAR-10 benchmark.
    """
    check_installed()
    from lightly.loss import NegativeCosineSimilarity

    encoder = plain_encoder(config.model)
    projector, predictor = _heads(config.method, encoder.num_features)
    # A strict load of every part shows that the architecture is the same.
    encoder.load_state_dict(part(weights, "encoder"))
    projector.layers.load_state_dict(part(weights, "projector"))
    predictor.layers.load_state_dict(part(weights, "predictor"))
    model = nn.ModuleList((encoder, projector, predictor)).to(device, memory_format=memory_format)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(
        [{"params": model.parameters(), "scheduled": True}],
        lr=config.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )

    def embed(x):
        z = projector(encoder(x).flatten(start_dim=1))
        return z.detach(), predictor(z)

    def step(views):
        x1, x2 = views.chunk(2)
        with precision():
            (z1, p1), (z2, p2) = embed(x1), embed(x2)
            loss = 0.5 * (criterion(z1, p2) + criterion(z2, p1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step.model, step.encoder, step.optimizer = model, encoder, optimizer
    return step


def _heads(heads, num_features):
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.models.modules.heads import ProjectionHead

    hidden, out = heads.projector.hidden, heads.projector.out
    if heads.projector.layers == 3:
        projector = SimSiamProjectionHead(num_features, hidden, out)
    else:
        # As their CIFAR-10 benchmark builds its two layers.
        widths = [num_features, *[hidden] * (heads.projector.layers - 1)]
        blocks = [(a, b, nn.BatchNorm1d(b), nn.ReLU(inplace=True)) for a, b in pairwise(widths)]
        projector = ProjectionHead([*blocks, (widths[-1], out, nn.BatchNorm1d(out, affine=False), None)])
    return projector, SimSiamPredictionHead(out, heads.predictor.hidden, out)


def build_loader(paths, *, spec, batch_size, workers, device):
    """Their SimSiamTransform with the numbers of `spec`, whose crops go up to the whole image, in a DataLoader."""
    check_installed()
    from lightly.transforms import SimSiamTransform

    assert spec.crop_scale[1] == 1, spec.crop_scale
    transform = SimSiamTransform(
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
    return data_loader(paths, transform, batch_size, workers, device)
