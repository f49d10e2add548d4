"""The draws of a batch handed to the augmenter, the same for every backend."""

import numpy as np
import torch

from fastsiam.config.views import ViewSpec
from fastsiam.data.rng import NO_JITTER, AugmentDraws
from fastsiam.kernels import augment_views


def augment(crops: torch.Tensor, draws: AugmentDraws, spec: ViewSpec, dtype: torch.dtype) -> torch.Tensor:
    """Flip, blur, colour, clamp, solarize, normalise.

    `crops`: uint8 [B, S, S, 3]; `draws`: B rows. Returns [B, 3, S, S] of `dtype`, channels-last in memory, on the
    device of `crops`. `spec.color` chooses the jitter: `exact` is torchvision's, operation by operation with a
    clamp after each; `matrix` folds it into one affine map and clamps once.
    """
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
    """The draws as the tensors that `augment_views` takes."""
    arrays = {name: getattr(draws, name) for name in ("flip", "sigma", "order", "grayscale", "solarize")}
    arrays["factors"] = np.where(draws.jitter[:, None], draws.factors, np.float32(NO_JITTER))
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
