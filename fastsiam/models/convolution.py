"""Convolutions that train by matrix products, on CPUs with AMX and where oneDNN's own are slower.

An AMX tile holds 16 rows, and oneDNN fills them from one row of the output: on maps of 4 or 7 pixels most of a tile is
empty, and gradients of weights and of strided layers reach less. A matrix product fills its tiles from all places of
all images. What it costs is a copy of the input, each pixel once for every place of the kernel ("columns"), which is
made again in the backward pass rather than kept.
"""

import os
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Values of the largest columns, 20 MB in bf16: the ones of 512 channels and 128 images of 4 px fit, whose gradient
# of the weight takes 12 % longer in two halves, with their sum in fp32.
_COLUMNS = 10 << 20


class Products(NamedTuple):
    """Which of a convolution's three are matrix products: the others are oneDNN's convolutions."""

    forward: bool
    of_input: bool
    of_weight: bool


def use_products(module: nn.Module) -> nn.Module:
    """Lets the plain convolutions in `module` train by matrix products where those are faster; returns `module`.

    In place, and only on a CPU with AMX. nn.Conv2d proper with one group, no dilation and zeros around; parameters and
    their names stay, and so does the forward in evaluation, outside of autocast to bf16, and on other devices.
    """
    if multiplies_tiles():
        for layer in module.modules():
            if _is_plain(layer):
                layer.__class__ = _Conv2d
    return module


def multiplies_tiles() -> bool:
    """Whether oneDNN multiplies bf16 in AMX tiles here.

    torch does not hand on what oneDNN answers, so its variable is read as oneDNN does (cpu_isa_traits.cpp).
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = limit.upper() in ("ALL", "DEFAULT") or "AMX" in limit.upper()
    return allowed and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def _is_plain(layer):
    # Padding that is a word ("same") may be one more behind than in front.
    return (
        type(layer) is nn.Conv2d
        and (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
        and isinstance(layer.padding, tuple)
    )


class _Conv2d(nn.Conv2d):
    def forward(self, x):
        if not _takes(self, x):
            return super().forward(x)
        places = _places(x.shape[2:], self.kernel_size, self.stride, self.padding)
        products = choose(self.in_channels, self.out_channels, self.kernel_size, self.stride, places)
        if not any(products):
            return super().forward(x)
        x, bias = x.to(torch.bfloat16), None if self.bias is None else self.bias.to(torch.bfloat16)
        return _Convolution.apply(x, self.weight, bias, self.stride, self.padding, products)


# As in the module tree, which the name of a class is a part of.
_Conv2d.__name__, _Conv2d.__qualname__, _Conv2d.__module__ = "Conv2d", "Conv2d", nn.Conv2d.__module__


def _takes(layer, x):
    return (
        layer.training
        and torch.is_grad_enabled()
        and layer.weight.requires_grad
        and x.dim() == 4
        and x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def choose(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int], places: list[int]) -> Products:
    """Returns what is faster as a matrix product, for a map of `places` (height, width) that comes out.

    A rule of shapes alone, so that a run has the same results each time. It is drawn where both ways took equally long
    on one thread of a Xeon with AMX, whose level-2 cache of 2 MB holds the weights of 256 times 256 channels at 3x3 and
    not of 256 times 512, for ResNet-18 at 16 to 32 px and ResNet-50 at 224 px (`benchmarks/LOG.md` has the table).
    """
    weights, width = inputs * outputs, places[1]
    match kernel, stride:
        case (1, 1), (1, 1):
            return Products(weights >= 1 << 15, weights >= 1 << 15, weights >= 1 << 15 and width <= 7)
        case (1, 1), (2, 2):
            return Products(weights >= 1 << 17 and width <= 14, weights >= 1 << 13, weights >= 1 << 15 and width <= 14)
        case (3, 3), (1, 1):
            narrow = weights >= 1 << 17 and width <= 4
            return Products(narrow, narrow, weights >= 1 << 15 and width <= 8)
        case (3, 3), (2, 2):
            narrow = weights >= 1 << 17 and width <= 7
            return Products(narrow, narrow, weights >= 1 << 15 and width <= 8)
    return Products(False, False, False)


class _Convolution(torch.autograd.Function):
    """x [N, C, H, W] and bias in bf16, the weight as the optimizer has it, whose gradient is not rounded to bf16."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, products):
        rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, rounded)
        ctx.numbers, ctx.products, ctx.dtype = (stride, padding), products, weight.dtype
        if products.forward:
            return convolved(x, rounded, bias, stride, padding)
        return F.conv2d(x, rounded, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding = ctx.numbers
        # The gradient of a mean over places is a tensor without memory of its own.
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_input = of_weight = None
        wanted, mine = ctx.needs_input_grad[:2], ctx.products[1:]
        theirs = [wants and not own for wants, own in zip(wanted, mine, strict=True)]
        if any(theirs):
            of_input, of_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [*theirs, False]
            )
        if wanted[0] and mine[0]:
            of_input = gradient_of_input(grad, weight, x.shape[2:], stride, padding)
        if wanted[1]:
            of_weight = gradient_of_weight(grad, x, weight.shape[2:], stride, padding) if mine[1] else of_weight
            of_weight = of_weight.to(ctx.dtype)
        of_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias, None, None, None


def convolved(x, weight, bias, stride, padding):
    """F.conv2d of x [N, C, H, W] and weight [D, C, h, w], both channels-last, by `mm`."""
    kernel = weight.shape[2:]
    by_place = weight.permute(0, 2, 3, 1).flatten(1).t()
    around = [(pad, pad) for pad in padding]
    found = []
    for part in _places_last(x).split(_at_a_time(_places(x.shape[2:], kernel, stride, padding), kernel, x.shape[1])):
        columns, places = _columns(part, kernel, stride, around)
        rows = columns @ by_place if bias is None else torch.addmm(bias, columns, by_place)
        found.append(rows.view(*places, -1))
    return _joined(found)


def gradient_of_input(grad, weight, size, stride, padding):
    """Gradient [N, C, H, W] of `convolved`'s x, whose height and width are `size`.

    Pixels with the same remainder by the stride see the same places of the kernel: a convolution without stride each.
    """
    by_place = weight.permute(2, 3, 0, 1)
    phases = list(product(*(
        _phases(*numbers) for numbers in zip(weight.shape[2:], size, grad.shape[2:], stride, padding, strict=True)
    )))  # fmt: skip
    found = []
    for part in _places_last(grad).split(_at_a_time(grad.shape[2:], weight.shape[2:], grad.shape[1])):
        out = None if tuple(stride) == (1, 1) else part.new_zeros(len(part), *size, weight.shape[1])
        for down, along in phases:
            taps = by_place[down.taps, along.taps]
            columns, places = _columns(part, taps.shape[:2], (1, 1), (down.around, along.around))
            pixels = (columns @ _turned(taps)).view(*places, -1)
            if out is None:
                out = pixels
            else:
                out[:, down.pixels, along.pixels] = pixels
        found.append(out)
    return _joined(found)


def _turned(taps):
    """[h*w*D, C] of taps [h, w, D, C], the last one first; in one copy, where flip keeps the strides and needs two."""
    rows = [tap for row in reversed(taps.unbind()) for tap in reversed(row.unbind())]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class _Phase(NamedTuple):
    """Pixels of one remainder along one axis, the places of the kernel that reach them, and what the gradient lacks in
    front and behind (negative: has too much)."""

    pixels: slice
    taps: slice
    around: tuple[int, int]


def _phases(kernel, size, places, stride, padding):
    for first in range(min(stride, size)):
        tap = (first + padding) % stride
        reach, count = len(range(tap, kernel, stride)), len(range(first, size, stride))
        if reach:
            # Pixel first + stride * i takes place i + last - t of the gradient by the tap `tap + stride * t`.
            last = (first + padding - tap) // stride
            around = reach - 1 - last, count + last - places
            yield _Phase(slice(first, None, stride), slice(tap, None, stride), around)


def gradient_of_weight(grad, x, kernel, stride, padding):
    """Gradient [D, C, h, w] of `convolved`'s weight: in fp32 where it is the sum of several parts, as bf16 would round.

    oneDNN takes a transposed factor at half to a quarter of its speed; the smaller one is transposed by a copy.
    """
    x, grad = _places_last(x), _places_last(grad)
    size = _at_a_time(grad.shape[1:3], kernel, x.shape[3])
    total = None
    for some, of_some in zip(x.split(size), grad.split(size), strict=True):
        columns, _ = _columns(some, kernel, stride, [(pad, pad) for pad in padding])
        rows = of_some.flatten(0, 2)
        if rows.shape[1] <= columns.shape[1]:
            part = rows.t().contiguous() @ columns
        else:
            part = (columns.t().contiguous() @ rows).t()
        total = part if size >= len(x) else part.float() if total is None else total.add_(part)
    return total.reshape(-1, *kernel, x.shape[3]).permute(0, 3, 1, 2)


def _places(size, kernel, stride, padding):
    """Height and width of the output."""
    return [(n + 2 * pad - k) // step + 1 for n, k, step, pad in zip(size, kernel, stride, padding, strict=True)]


def _at_a_time(places, kernel, channels):
    """Images whose columns are made at a time; those of 1x1 are not larger than the images."""
    taps = kernel[0] * kernel[1]
    return 1 << 31 if taps == 1 else max(1, _COLUMNS // (places[0] * places[1] * taps * channels))


def _places_last(images):
    return images.permute(0, 2, 3, 1)


def _joined(parts):
    """Images [N, C, H, W], channels-last, of parts [n, H, W, C]."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(0, 3, 1, 2)


def _columns(images, kernel, stride, around):
    """Columns [N*P*Q, h*w*C] of images [N, H, W, C] with zeros `around`, and (N, P, Q)."""
    if any(map(any, around)):
        images = F.pad(images, (0, 0, *around[1], *around[0]))
    windows = images.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * images.shape[3]), windows.shape[:3]
