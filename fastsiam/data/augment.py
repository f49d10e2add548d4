"""Augmenter of all backends: crops and draws in, views out."""

import numpy as np
import torch

from fastsiam.config.views import ViewSpec
from fastsiam.data.rng import AugmentDraws
from fastsiam.kernels import augment_views


def augment(crops: torch.Tensor, draws: AugmentDraws, spec: ViewSpec, dtype: torch.dtype) -> torch.Tensor:
    """Flips, blurs, jitters, clamps, solarizes and normalises crops; finished views stay as they are.

    `crops`: uint8 [B, S, S, 3]; `draws`: B rows. Returns [B, 3, S, S] of `dtype`, channels-last in memory, on the
    device of `crops`. `spec.color` chooses the jitter: `exact` is torchvision's, operation by operation with a
    clamp after each; `matrix` folds it into one affine map and clamps once.
    """
    if crops.is_floating_point():
        return crops
    return augment_views(
        crops,
        **host_draws(draws),
        color=spec.color,
        blur_kind=spec.blur_kind,
        mean=spec.mean,
        std=spec.std,
        dtype=dtype,
    )


def host_draws(draws: AugmentDraws) -> dict[str, torch.Tensor]:
    """Returns draws as the tensors that `augment_views` takes."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(draws).items()}
