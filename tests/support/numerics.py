"""Plain references of kernels, and how exact a kernel must be."""

import numpy as np
import torch


def by_definition(image, box, size):
    """Pillow's bilinear filter (Resample.c): a triangle as wide as the scale where it shrinks, weights normalised."""

    def matrix(begin, length, limit):
        scale = length / size
        reach, center = max(scale, 1), begin + (np.arange(size) + 0.5) * scale
        pixels = np.arange(max(np.floor(begin), 0), min(np.ceil(begin + length), limit))
        weights = np.clip(1 - np.abs(pixels + 0.5 - center[:, None]) / reach, 0, None)
        return weights / weights.sum(1, keepdims=True), pixels.astype(int)

    down, rows = matrix(box[0], box[2], image.shape[0])
    along, columns = matrix(box[1], box[3], image.shape[1])
    pixels = image[rows][:, columns].astype(np.float64)
    return np.einsum("yr,xc,rcd->yxd", down, along, pixels)


def loop_distance(p, z):
    """D(p, z) of Algorithm 1: l2-normalise both, -(p * z).sum(dim=1).mean()."""
    total = 0.0
    for row in range(len(p)):
        p_norm = sum(value * value for value in p[row]) ** 0.5
        z_norm = sum(value * value for value in z[row]) ** 0.5
        total += sum((a / p_norm) * (b / z_norm) for a, b in zip(p[row], z[row], strict=True))
    return -total / len(p)


def algorithm_1(p1, p2, z1, z2, stop_gradient=True):
    """The loss of two views in torch, for autograd, in the precision of what it is given."""

    def distance(p, z):
        z = z.detach() if stop_gradient else z
        p, z = p / p.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
        return -(p * z).sum(dim=1).mean()

    return distance(p1, z2) / 2 + distance(p2, z1) / 2


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_as_exact_as_plain(ours, exact, plain, dtype):
    """Gradients of `dtype` within twice the error of plain PyTorch's, and one ulp, from those in fp64."""
    for mine, truth, theirs in zip(ours, exact, plain, strict=True):
        if truth is None:
            assert mine is None
            continue
        assert mine.dtype == dtype
        ulp = torch.finfo(dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + ulp
