"""Crops out of images of one size, cut and resized in one pass over the pixels."""

import numpy as np
import torch

from fastsiam.kernels.crop_numba import check_boxes, crop_on_cpu
from fastsiam.kernels.crop_triton import crop_on_cuda
from fastsiam.kernels.transfer import send


def crop_resize(images, boxes, size, indices=None):
    """B square crops of N images of one size, resized with Pillow's antialiased bilinear filter.

    `images`: contiguous uint8 [N, H, W, 3], on the CPU or a CUDA device. `boxes`: fp32 or fp64 [B, 4]: top, left,
    height, width in pixels of the image, fractions allowed; pixels that a box does not touch have no part in its crop.
    `indices`: int64 [B], the image that each crop is of; None: crop b is of image b. Boxes and indices may be on the
    host, from where a CUDA device gets them without waiting, or on the device of `images`.

    Returns uint8 [B, size, size, 3] on the device of `images`. Raises `ValueError` for arguments of another kind, and
    for boxes and indices on the host that are empty or reach outside; those on a CUDA device are not read back, and
    must be right.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.is_contiguous():
        raise ValueError(
            f"crop_resize: images must be contiguous uint8 [N, H, W, 3], got {images.dtype} {tuple(images.shape)} with "
            f"strides {images.stride()}"
        )
    if boxes.dtype not in (torch.float32, torch.float64) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"crop_resize: boxes must be fp32 or fp64 [B, 4], got {boxes.dtype} {tuple(boxes.shape)}")
    if indices is None:
        if len(boxes) != len(images):
            raise ValueError(f"crop_resize: {len(boxes)} boxes for {len(images)} images need indices")
    elif indices.dtype != torch.int64 or indices.shape != boxes.shape[:1]:
        raise ValueError(
            f"crop_resize: indices must be int64 [{len(boxes)}], one a box, got {indices.dtype} {tuple(indices.shape)}"
        )
    if size < 1:
        raise ValueError(f"crop_resize: size must be 1 or more, got {size}")
    return crop_resize_op(images, boxes, size, indices)


@torch.library.custom_op("fastsiam::crop_resize", mutates_args=(), device_types="cpu")
def crop_resize_op(
    images: torch.Tensor, boxes: torch.Tensor, size: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """See `crop_resize`; no gradient, for images are integers."""
    number, height, width = images.shape[:3]
    _check_indices(indices, number)
    taken = np.arange(len(boxes)) if indices is None else indices.numpy()
    addresses = images.data_ptr() + taken * (3 * height * width)
    return crop_on_cpu(addresses, np.broadcast_to((height, width), (len(boxes), 2)), boxes.numpy()[None], size)


@crop_resize_op.register_kernel("cuda")
def _(images, boxes, size, indices=None):
    if not boxes.is_cuda:
        check_boxes(boxes.numpy(), np.array(images.shape[1:3]))
    if indices is not None:
        if not indices.is_cuda:
            _check_indices(indices, len(images))
        indices = send(indices, images)
    return crop_on_cuda(images, send(boxes.float(), images), size, indices)


@crop_resize_op.register_fake
def _(images, boxes, size, indices=None):
    return images.new_empty((len(boxes), size, size, 3))


def _check_indices(indices, number):
    if indices is not None and len(indices) and not 0 <= indices.min() <= indices.max() < number:
        raise ValueError(f"crop_resize: indices must be from 0 to {number - 1}, those of the images")
