"""Augmenter behind every backend: uint8 crops become normalised views in one pass over the pixels."""

import torch

from fastsiam.kernels.augment_numba import augment_on_cpu
from fastsiam.kernels.augment_table import view_table
from fastsiam.kernels.augment_triton import augment_on_cuda
from fastsiam.kernels.reference import BLUR_KINDS, BLUR_TAPS, scale_and_bias
from fastsiam.kernels.transfer import send

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def augment_views(
    crops, *, flip, sigma, order, factors, grayscale, solarize, color, mean, std, dtype, blur_kind="gaussian"
):
    """Flips, blurs, colours, clamps, solarizes and normalises B square crops, in that order.

    `crops`: uint8 [B, S, S, 3], on the CPU or a CUDA device. The draws are tensors on the host, one row a view: `flip`,
    `grayscale`, `solarize` bool [B]; `sigma` fp32 [B], the blur's in pixels, 0 for none; `order` integer [B, 4], which
    of (brightness, contrast, saturation, hue) comes first, second, ...; `factors` fp32 [B, 4] in that naming order,
    hue in turns, (1, 1, 1, 0) for no change. `color` is `exact`, torchvision's operations with a clamp after each, or
    `matrix`, all of them as one affine map of RGB with one clamp at the end. `mean` and `std`: three numbers each,
    of values in [0, 1]. `blur_kind` is `gaussian`, a Gaussian sampled at 13 taps with the borders reflected as in
    torchvision, or `pil`, the three boxes of Pillow's GaussianBlur: within 3 of 255 levels of Pillow, which rounds to 8
    bits after each of six passes. Above sigma 1.41 that does not hold for the outer pixels, whose edge Pillow repeats
    and this reflects (up to 16 levels in noise of black and white).

    Returns [B, 3, S, S] of `dtype` (fp32, bf16 or fp16), channels-last in memory, on the device of `crops`. Raises
    `ValueError` for crops of another kind, and for a blur of crops smaller than its reach.
    """
    if crops.dtype != torch.uint8 or crops.ndim != 4 or crops.shape[3] != 3 or crops.shape[1] != crops.shape[2]:
        raise ValueError(f"augment_views: crops must be uint8 [B, S, S, 3], got {crops.dtype} {tuple(crops.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"augment_views: dtype must be one of {DTYPES}, got {dtype}")
    if color not in ("matrix", "exact"):
        raise ValueError(f"augment_views: color must be matrix or exact, got {color!r}")
    if blur_kind not in BLUR_KINDS:
        raise ValueError(f"augment_views: blur_kind must be pil or gaussian, got {blur_kind!r}")
    if crops.shape[1] <= BLUR_TAPS // 2 and (sigma > 0).any():
        raise ValueError(f"augment_views: a blur of {BLUR_TAPS} taps needs crops of more than {BLUR_TAPS // 2} pixels")
    table = view_table(flip, sigma, order, factors, grayscale, solarize, color == "exact", blur_kind)
    scale, bias = scale_and_bias(mean, std)
    return augment_views_op(crops, send(table, crops), list(scale), list(bias), color == "exact", dtype)


@torch.library.custom_op("fastsiam::augment_views", mutates_args=(), device_types="cpu")
def augment_views_op(
    crops: torch.Tensor, table: torch.Tensor, scale: list[float], bias: list[float], exact: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the views of `crops` with the draws of `table` [B, WIDTH]; no gradient, for crops are integers."""
    return augment_on_cpu(crops, table, scale, bias, exact, dtype)


augment_views_op.register_kernel("cuda")(augment_on_cuda)


@augment_views_op.register_fake
def _(crops, table, scale, bias, exact, dtype):
    return crops.new_empty(crops.shape, dtype=dtype).permute(0, 3, 1, 2)
