"""What happens to a view, as one row of fp32: the form in which draws reach every augmenter, in one copy."""

import numpy as np
import torch

from fastsiam.kernels.reference import BLUR_TAPS, LUMA, RGB_TO_YIQ, YIQ_TO_RGB

REACH = BLUR_TAPS // 2
FLIP, SOLARIZE = 0, 1
# The weights of the middle tap and of those at 1 ... REACH from it; all zero where there is no blur.
BLUR = 2
# With color=matrix: linear 9, row 3, column 3, as in reference.fold_color; with exact: order 4, factors 4, grayscale 1.
COLOR = BLUR + REACH + 1
WIDTH = COLOR + 15

_TO_YIQ, _TO_RGB = np.array(RGB_TO_YIQ), np.array(YIQ_TO_RGB)


def view_table(flip, sigma, order, factors, grayscale, solarize, exact: bool) -> torch.Tensor:
    """fp32 [B, WIDTH] on the host from the draws of B views; see `augment_views`."""
    table = np.zeros((len(flip), WIDTH), np.float32)
    table[:, FLIP], table[:, SOLARIZE] = flip.numpy(), solarize.numpy()
    table[:, BLUR:COLOR] = _blur_weights(sigma.numpy())
    if exact:
        table[:, COLOR : COLOR + 4], table[:, COLOR + 4 : COLOR + 8] = order.numpy(), factors.numpy()
        table[:, COLOR + 8] = grayscale.numpy()
    else:
        table[:, COLOR:] = _fold(order.numpy(), factors.double().numpy(), grayscale.numpy())
    return torch.from_numpy(table)


def _blur_weights(sigma):
    """Of a Gaussian of `sigma` [B] pixels: [B, REACH + 1], which with its mirror image sums to 1."""
    weights = np.exp(-0.5 * (np.arange(REACH + 1) / np.where(sigma > 0, sigma, 1)[:, None].astype(np.float64)) ** 2)
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True)
    return np.where(sigma[:, None] > 0, weights, 0)


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
    linear, row, column = np.broadcast_to(eye, (len(order), 3, 3)), np.zeros((len(order), 3)), np.zeros((len(order), 3))
    for operation in order.T:
        is_contrast = (operation == 1)[:, None]
        by = linear_of[operation, views]
        row = np.where(is_contrast, LUMA @ linear, row)
        linear, column = by @ linear, (by @ column[:, :, None])[:, :, 0]
        column = np.where(is_contrast, 1 - contrast[:, 0], column)
    linear = np.where(grayscale[:, None, None], to_grey @ linear, linear)
    column = np.where(grayscale[:, None], (column @ LUMA)[:, None], column)
    return np.concatenate((linear.reshape(-1, 9), row, column), 1)
