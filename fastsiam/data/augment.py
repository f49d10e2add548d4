"""From uint8 crops to normalised views: the one augmenter behind every backend.

The draws live on the host, so which images an operation touches is known there: each operation runs only on
those, by index, and nothing is read back from the device.
"""

import numpy as np
import torch

from fastsiam.data.draws import AugmentDraws
from fastsiam.data.views import ViewSpec
from fastsiam.kernels import reference


def augment(crops: torch.Tensor, draws: AugmentDraws, spec: ViewSpec, dtype: torch.dtype) -> torch.Tensor:
    """Flip, blur, colour, clamp, solarize, normalise.

    `crops`: uint8 [B, S, S, 3]; `draws`: B rows. Returns [B, 3, S, S] of `dtype`, channels-last in memory, on the
    device of `crops`. `spec.color` chooses the jitter: `exact` is torchvision's, operation by operation with a
    clamp after each; `matrix` folds it into one affine map and clamps once.
    """
    x = to_unit(crops)
    x = _on(x, draws.flip, lambda part: part.flip(3))
    sigma = draws.sigma[draws.sigma > 0]
    x = _on(x, draws.sigma > 0, lambda part: reference.gaussian_blur(part, _tensor(sigma, part)))
    x = _exact_color(x, draws) if spec.color == "exact" else _matrix_color(x, draws)
    x = _on(x, draws.solarize, lambda part: torch.where(part >= 0.5, 1 - part, part))
    return normalize(x, spec, dtype)


def to_unit(crops: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] to fp32 [B, 3, S, S] in [0, 1], channels-last."""
    return crops.permute(0, 3, 1, 2).float().div_(255)


def normalize(x: torch.Tensor, spec: ViewSpec, dtype: torch.dtype) -> torch.Tensor:
    """(x - mean) / std per channel, stored as `dtype` channels-last."""
    scale = 1 / np.asarray(spec.std, np.float32)
    bias = -np.asarray(spec.mean, np.float32) * scale
    x = x * _tensor(scale, x).view(1, 3, 1, 1) + _tensor(bias, x).view(1, 3, 1, 1)
    return x.to(dtype, memory_format=torch.channels_last)


def _exact_color(x, draws):
    for step in range(4):
        for operation, function in enumerate(reference.EXACT_JITTER):
            chosen = draws.jitter & (draws.order[:, step] == operation)
            factors = draws.factors[chosen, operation]
            x = _on(x, chosen, lambda part, f=function, a=factors: f(part, _tensor(a, part)))
    return _on(x, draws.grayscale, lambda part: reference.luma(part).expand_as(part))


def _matrix_color(x, draws):
    linear, offset = reference.color_matrix(
        x.mean((2, 3)), _send(draws.order, x), _tensor(draws.factors, x), _send(draws.grayscale, x)
    )
    return reference.apply_color(x, linear, offset).clamp_(0, 1)


def _on(x, chosen, function):
    """`function` on the images where the host array `chosen` [B] is true, the others as they are."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return function(x)
    index = _send(rows, x)
    return x.index_copy(0, index, function(x.index_select(0, index)))


def _tensor(array, like):
    return _send(array, like).to(like.dtype)


def _send(array, like):
    """A host array on the device of `like`, through pinned memory: a copy from pageable memory waits for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor
