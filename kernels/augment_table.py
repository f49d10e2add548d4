"""Table of draws, one row of fp32 a view: the form in which they reach every augmenter, in one copy."""

import numpy as np
import torch

from fastsiam.kernels.reference import BLUR_TAPS, LUMA, RGB_TO_YIQ, YIQ_TO_RGB

REACH = BLUR_TAPS // 2
FLIP, SOLARIZE = 0, 1
# 1 where a blur reflects the borders with their edge, as pil does, 0 where without.
EDGE = 2
# The weights of the middle tap and of those at 1 ... REACH from it; all zero where there is no blur.
BLUR = 3
# With color=matrix: linear 9, row 3, column 3, as in reference.fold_color; with exact: order 4, factors 4, grayscale 1.
COLOR = BLUR + REACH + 1
WIDTH = COLOR + 15

_TO_YIQ, _TO_RGB = np.array(RGB_TO_YIQ), np.array(YIQ_TO_RGB)


def view_table(flip, sigma, order, factors, grayscale, solarize, exact: bool, blur_kind="gaussian") -> torch.Tensor:
    """fp32 [B, WIDTH] on the host from the draws of B views; see `augment_views`."""
    table = np.zeros((len(flip), WIDTH), np.float32)
    table[:, FLIP], table[:, SOLARIZE] = flip.numpy(), solarize.numpy()
    table[:, EDGE] = blur_kind == "pil"
    table[:, BLUR:COLOR] = _blur_weights(sigma.numpy(), blur_kind)
    if exact:
        table[:, COLOR : COLOR + 4], table[:, COLOR + 4 : COLOR + 8] = order.numpy(), factors.numpy()
        table[:, COLOR + 8] = grayscale.numpy()
    else:
        table[:, COLOR:] = _fold(order.numpy(), factors.double().numpy(), grayscale.numpy())
    return torch.from_numpy(table)


def _blur_weights(sigma, kind):
    """The middle tap and those to one side of `reference.blur_weights`, in fp64: [B, REACH + 1] for `sigma` [B]."""
    blurred = np.where(sigma > 0, sigma, 1)[:, None].astype(np.float64)
    weights = _three_boxes(blurred) if kind == "pil" else _sampled(blurred)
    return np.where(sigma[:, None] > 0, weights, 0)


def _sampled(sigma):
    weights = np.exp(-0.5 * (np.arange(REACH + 1) / sigma) ** 2)
    return weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True))


def _three_boxes(sigma):
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    far = np.abs(np.arange(-2, 3)) - whole
    box = weights = np.where(far <= 0, 1, np.where(far == 1, part, 0)) / (2 * whole + 1 + 2 * part)
    for _ in range(2):
        narrow, weights = weights, np.zeros((len(box), weights.shape[1] + 4))
        for tap in range(5):
            weights[:, tap : tap + narrow.shape[1]] += box[:, tap : tap + 1] * narrow
    return weights[:, REACH:]


def _fold(order, factors, grayscale):
    """`reference.fold_color` in NumPy and fp64, [B, 15]: as torch operations on a busy CPU 64 views cost 16 ms."""
    brightness, contrast, saturation, turn = factors.T[:, :, None, None]
    eye, to_grey = np.eye(3), np.tile(LUMA, (3, 1))
    angle = -2 * np.pi * turn
    y, i, q = (np.outer(_TO_RGB[:, k], _TO_YIQ[k]) for k in range(3))
    iq, qi = np.outer(_TO_RGB[:, 1], _TO_YIQ[2]), np.outer(_TO_RGB[:, 2], _TO_YIQ[1])
    linear_of = np.stack(
        (
            brightness * eye,
            contrast * eye,
            saturation * eye + (1 - saturation) * to_grey,
            y + np.cos(angle) * (i + q) + np.sin(angle) * (qi - iq),
        )
    )
    views = np.arange(len(order))
    linear, row, column = np.broadcast_to(eye, (len(order), 3, 3)), *np.zeros((2, len(order), 3))
    for operation in order.T:
        is_contrast = (operation == 1)[:, None]
        by = linear_of[operation, views]
        row = np.where(is_contrast, LUMA @ linear, row)
        linear, column = by @ linear, (by @ column[:, :, None])[:, :, 0]
        column = np.where(is_contrast, 1 - contrast[:, 0], column)
    linear = np.where(grayscale[:, None, None], to_grey @ linear, linear)
    column = np.where(grayscale[:, None], (column @ LUMA)[:, None], column)
    return np.concatenate((linear.reshape(-1, 9), row, column), 1)
