"""The mathematics of every kernel in plain torch, with which tests and benchmarks compare it.

Colour operations take images [B, 3, H, W] in [0, 1] and one factor per image [B]; none of them reads a value back
to the host. Sources: torchvision's ColorJitter, RandomGrayscale, RandomSolarize and GaussianBlur, Pillow's BoxBlur.c.
"""

import functools
import math

import torch
import torch.nn.functional as F

from fastsiam.kernels.transfer import send

# Thirteen taps reach three standard deviations at sigma 2, the largest that the paper draws, and hold Pillow's three
# boxes up to sigma 2.4.
BLUR_TAPS = 13
BLUR_KINDS = ("pil", "gaussian")
# ITU-R 601-2 luma as torchvision rounds it.
LUMA = (0.2989, 0.587, 0.114)
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
# As in torch.nn.functional.cosine_similarity: the smallest norm that a row is divided by.
SMALLEST_NORM = 1e-8
# A box that ends this little past a pixel's edge, by a rounding error in fp32, excludes the pixel.
CROP_EDGE = 2.0**-10
YIQ_TO_RGB = tuple(map(tuple, torch.linalg.inv(torch.tensor(RGB_TO_YIQ, dtype=torch.float64)).tolist()))


def negative_cosine_ref(p1, p2, z1, z2, *, stop_gradient=True, counter=None):
    """SimSiam's Eq. 2 over [N, d] predictions and projections; a scalar in max(fp32, input dtype).

    `counter` is the kernel's; nothing is counted here.
    """
    if stop_gradient:
        z1, z2 = z1.detach(), z2.detach()
    return -(mean_cosine(p1, z2) + mean_cosine(p2, z1)) / 2


def negative_cosine_asymmetric_ref(p, z, *, stop_gradient=True):
    """SimSiam's Eq. 1: one prediction [N, d] against one projection [N, d]."""
    return -mean_cosine(p, z.detach() if stop_gradient else z)


def negative_cosine_mean_target_ref(p, z, *, stop_gradient=True):
    """One prediction [N, d] against the mean of K projections [K, N, d]."""
    z = z.detach() if stop_gradient else z
    return -mean_cosine(p, z.to(torch.promote_types(z.dtype, torch.float32)).mean(0))


def negative_cosine_all_pairs_ref(p, z, *, stop_gradient=True):
    """The mean of D(p_i, z_j) over all ordered pairs i != j of K views, p and z both [K, N, d].

    For one i the sum of the cosines over j is the product of p_i's direction with the sum of the others' directions:
    the work grows with K, not with its square.
    """
    z = z.detach() if stop_gradient else z
    dtype = torch.promote_types(torch.promote_types(p.dtype, z.dtype), torch.float32)
    p, z = (F.normalize(x.to(dtype), dim=2, eps=SMALLEST_NORM) for x in (p, z))
    cosines = (p * (z.sum(0) - z)).sum(2)
    return -cosines.mean() / (len(p) - 1)


def mean_cosine(p, z):
    """Mean cosine similarity of the rows of two [N, d] tensors, accumulated in at least fp32."""
    dtype = torch.promote_types(torch.promote_types(p.dtype, z.dtype), torch.float32)
    return F.cosine_similarity(p.to(dtype), z.to(dtype), dim=1).mean()


def nt_xent_ref(z, temperature, *, num_views=2):
    """SimCLR's NT-Xent from the matrix [V*N, V*N] of all similarities."""
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1, eps=SMALLEST_NORM)
    logits = z @ z.t() / temperature
    row = torch.arange(len(z), device=z.device)
    image = row % (len(z) // num_views)
    is_self, is_positive = row == row.unsqueeze(1), image == image.unsqueeze(1)
    lse = logits.masked_fill(is_self, -math.inf).logsumexp(1)
    return lse.mean() - logits[is_positive & ~is_self].mean()


def max_pool_ref(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """The maxima of square windows of [B, C, H, W]."""
    return F.max_pool2d(x, kernel_size, stride, padding)


def info_nce_ref(queries, keys, positives, temperature, *, selves=None):
    """InfoNCE of queries [n, D] against keys [M, D] from the matrix [n, M]; the mean over positives [n] or [n, P]."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    queries, keys = (F.normalize(x.to(dtype), dim=1, eps=SMALLEST_NORM) for x in (queries, keys))
    logits = queries @ keys.t() / temperature
    if selves is not None:
        logits = logits.scatter(1, selves.unsqueeze(1), -math.inf)
    columns = positives.view(len(queries), -1).unbind(1)
    return torch.stack([F.cross_entropy(logits, column) for column in columns]).mean()


def info_nce_queue_ref(queries, keys, queue, temperature):
    """MoCo's cross-entropy over the logits [n, 1 + K]."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    dtype = torch.promote_types(queue.dtype, dtype)
    queries, keys = (F.normalize(x.to(dtype), dim=1, eps=SMALLEST_NORM) for x in (queries, keys))
    logits = torch.cat(((queries * keys).sum(1, keepdim=True), queries @ queue.to(dtype).t()), 1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def sinkhorn_ref(scores, epsilon, *, iterations=3, of_all_ranks=None, weights=None):
    """SwAV's codes by logarithms, which no score overflows."""
    everywhere = of_all_ranks or (lambda x: x.unsqueeze(0))
    codes = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        counted = codes if weights is None else codes.masked_fill(weights.unsqueeze(1) == 0, -math.inf)
        codes = codes - everywhere(counted.logsumexp(0)).logsumexp(0)
        codes = codes - codes.logsumexp(1, keepdim=True)
    return codes.exp()


def luma(x):
    """Grey value [B, 1, H, W] of RGB images [B, 3, H, W]."""
    r, g, b = x.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(1)


def blend(x, other, factor):
    """factor * x + (1 - factor) * other, clamped to [0, 1]; `factor` is [B]."""
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(x, factor):
    return (x * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_contrast(x, factor):
    return blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    return blend(x, luma(x), factor)


def adjust_hue(x, turn):
    """Rotate HSV's hue by `turn` [B] of a full turn."""
    r, g, b = x.unbind(1)
    value, _ = x.max(1)
    low, _ = x.min(1)
    chroma = value - low
    grey = chroma == 0
    safe = torch.where(grey, torch.ones_like(chroma), chroma)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * turn.view(-1, 1, 1)
    # Each channel of HSV -> RGB is value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + hue) mod 6, n = 5, 3, 1.
    k = torch.stack((5 + hue, 3 + hue, 1 + hue), 1) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


EXACT_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_matrix(mean, order, factors, grayscale):
    """The whole jitter of a view as one affine map of RGB, without the clamps between its operations.

    `mean`: [B, 3] the crop's mean colour in [0, 1]; `order`: [B, 4] integers, which of (brightness, contrast,
    saturation, hue) comes first, second, ...; `factors`: [B, 4] in that fixed naming order, hue in turns;
    `grayscale`: [B] bool. Returns the linear part [B, 3, 3] and the offset [B, 3].
    """
    linear, row, column = fold_color(order, factors, grayscale)
    return linear, column * (row * mean).sum(1, keepdim=True)


def fold_color(order, factors, grayscale):
    """Returns the part of the affine map that does not depend on the crop: linear [B, 3, 3], row [B, 3], column [B, 3].

    Contrast alone has an offset: (1 - factor) times the grey mean of its input. All other operations are linear, so the
    offset of the chain is `column * (row @ mean)`.
    """
    size, luma_row = len(factors), _constant(LUMA, factors.device, factors.dtype)
    eye = torch.eye(3, dtype=factors.dtype, device=factors.device).expand(size, 3, 3)
    to_grey = luma_row.expand(3, 3)
    brightness, contrast, saturation, _ = factors.unsqueeze(-1).unsqueeze(-1).unbind(1)
    saturate, turn = saturation * eye + (1 - saturation) * to_grey, _hue_rotation(factors[:, 3])
    linear_of = torch.stack((brightness * eye, contrast * eye, saturate, turn), 1)
    linear, row, column = eye, torch.zeros_like(factors[:, :3]), torch.zeros_like(factors[:, :3])
    rows = torch.arange(size, device=factors.device)
    for step in range(4):
        operation = order[:, step]
        is_contrast = (operation == 1).unsqueeze(-1)
        row = torch.where(is_contrast, luma_row @ linear, row)
        a = linear_of[rows, operation]
        linear, column = a @ linear, (a @ column.unsqueeze(-1)).squeeze(-1)
        column = torch.where(is_contrast, (1 - factors[:, 1:2]).expand_as(column), column)
    grey = grayscale.view(-1, 1, 1)
    return (
        torch.where(grey, to_grey @ linear, linear),
        row,
        torch.where(grey.squeeze(-1), (column @ luma_row).unsqueeze(-1).expand_as(column), column),
    )


def _hue_rotation(turn):
    """RGB matrices [B, 3, 3] that turn hue by `turn` [B]: a rotation of YIQ's chroma plane by -2 pi turn."""
    to_yiq = _constant(RGB_TO_YIQ, turn.device, turn.dtype)
    to_rgb = _constant(YIQ_TO_RGB, turn.device, turn.dtype)
    angle = -2 * math.pi * turn
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack((one, zero, zero, zero, cos, -sin, zero, sin, cos), -1).view(-1, 3, 3)
    return to_rgb @ rotation @ to_yiq


@functools.cache
def _constant(values, device, dtype):
    """A constant on a device, copied there once: every such copy makes the host wait."""
    return torch.tensor(values, device=device, dtype=dtype)


def apply_color(x, linear, offset):
    """linear @ rgb + offset at every pixel of [B, 3, H, W]."""
    flat = torch.baddbmm(offset.unsqueeze(-1), linear, x.flatten(2))
    return flat.view_as(x)


def blur(x, sigma, kind):
    """Separable blur of [B, 3, H, W] by `BLUR_TAPS` taps; `sigma` [B] in pixels, `kind` as in `blur_weights`.

    `gaussian` reflects the borders without their edge, as torchvision does. `pil` reflects the edge too: up to sigma
    1.41, where a pass of Pillow reaches one pixel, that equals Pillow's repetition of the edge in each pass.
    """
    reach = BLUR_TAPS // 2
    weights = blur_weights(sigma, kind).view(len(x), BLUR_TAPS, 1, 1, 1)
    for dim in (3, 2):
        size, edge = x.shape[dim], int(kind == "pil")
        before, after = x.narrow(dim, 1 - edge, reach), x.narrow(dim, size - 1 + edge - reach, reach)
        padded = torch.cat((before.flip(dim), x, after.flip(dim)), dim)
        x = sum(weights[:, tap] * padded.narrow(dim, tap, size) for tap in range(BLUR_TAPS))
    return x


def blur_weights(sigma, kind):
    """[B, BLUR_TAPS], each row of it summing to 1, for `sigma` [B] in pixels.

    `gaussian` samples the density at the taps. `pil` is Pillow's GaussianBlur: three passes of a box whose ends count
    in part, so that its variance is sigma^2 / 3. A sampled Gaussian hardly blurs below sigma 0.5, Pillow's boxes do.
    """
    reach = BLUR_TAPS // 2
    if kind == "gaussian":
        position = torch.arange(-reach, reach + 1, device=sigma.device, dtype=sigma.dtype)
        weights = torch.exp(-0.5 * (position / sigma.unsqueeze(-1)) ** 2)
        return weights / weights.sum(-1, keepdim=True)
    variance = sigma.unsqueeze(-1) ** 2 / 3
    whole = torch.floor((torch.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    far = torch.arange(-2, 3, device=sigma.device, dtype=sigma.dtype).abs() - whole
    box = torch.where(far <= 0, torch.ones_like(far), torch.where(far == 1, part, torch.zeros_like(far)))
    box = weights = box / (2 * whole + 1 + 2 * part)
    for _ in range(2):
        weights = sum(box[:, tap : tap + 1] * F.pad(weights, (tap, 4 - tap)) for tap in range(5))
    return weights


def augment_views_ref(
    crops, *, flip, sigma, order, factors, grayscale, solarize, color, mean, std, dtype, blur_kind="gaussian"
):
    """Flip, blur, colour, clamp, solarize, normalise; see `augment_views`.

    The draws are on the host, so each operation runs only on the views that it touches, and nothing is read back.
    """
    x = to_unit(crops, torch.promote_types(dtype, torch.float32))
    x = _on(x, flip, lambda part: part.flip(3))
    x = _on(x, sigma > 0, lambda part, drawn: blur(part, drawn, blur_kind), sigma)
    if color == "exact":
        x = _exact_color(x, order, factors, grayscale)
    else:
        drawn = (send(draw, x) for draw in (order, factors.to(x.dtype), grayscale))
        x = apply_color(x, *color_matrix(x.mean((2, 3)), *drawn)).clamp_(0, 1)
    x = _on(x, solarize, lambda part: torch.where(part >= 0.5, 1 - part, part))
    return normalize(x, mean, std, dtype)


def to_unit(crops, dtype=torch.float32):
    """uint8 [B, S, S, 3] to `dtype` [B, 3, S, S] in [0, 1], channels-last."""
    return crops.permute(0, 3, 1, 2).to(dtype).div_(255)


def normalize(x, mean, std, dtype):
    """(x - mean) / std per channel of [B, 3, H, W], stored as `dtype` channels-last."""
    scale, bias = (_constant(numbers, x.device, x.dtype).view(1, 3, 1, 1) for numbers in scale_and_bias(mean, std))
    return (x * scale + bias).to(dtype, memory_format=torch.channels_last)


def scale_and_bias(mean, std):
    """(x - mean) / std as scale * x + bias: two tuples of three."""
    return tuple(1 / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def _exact_color(x, order, factors, grayscale):
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for step in range(4):
        for operation, function in enumerate(EXACT_JITTER):
            chosen = (order[:, step] == operation) & (factors[:, operation] != neutral[operation])
            x = _on(x, chosen, function, factors[:, operation])
    return _on(x, grayscale, lambda part: luma(part).expand_as(part))


def _on(x, chosen, function, *draws):
    """`function` on the images where the host's `chosen` [B] is true, the others as they are."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return x
    index = send(rows, x)
    part = function(x.index_select(0, index), *(send(draw[rows].to(x.dtype), x) for draw in draws))
    return part if len(rows) == len(x) else x.index_copy(0, index, part)


def crop_resize_ref(images, boxes, size, indices=None):
    """B crops as products with dense matrices of weights, in fp32 or the dtype of `boxes`; see `crop_resize`."""
    boxes = send(boxes, images)
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    if indices is not None:
        images = images[send(indices, images)]
    top, left, height, width = boxes.unbind(1)
    down = crop_weights(top, height, images.shape[1], size).unsqueeze(1)
    along = crop_weights(left, width, images.shape[2], size).unsqueeze(1)
    crops = down @ images.permute(0, 3, 1, 2).to(boxes.dtype) @ along.transpose(2, 3)
    return (crops + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def crop_weights(begin, length, limit: int, size: int):
    """Pillow's bilinear filter (Resample.c) along one axis: [B, size, limit], each row of it summing to 1.

    `begin`, `length`: [B] in pixels of `limit`. A triangle about the output's centre, of two pixels where the box is
    enlarged and of two outputs where it shrinks, over the pixels that the box touches.
    """
    scale = (length / size).view(-1, 1, 1)
    place = torch.arange(limit, device=begin.device, dtype=begin.dtype)
    output = torch.arange(size, device=begin.device, dtype=begin.dtype).view(1, -1, 1)
    center = begin.view(-1, 1, 1) + (output + 0.5) * scale
    low = torch.floor(begin + CROP_EDGE)
    high = torch.maximum(torch.ceil(begin + length - CROP_EDGE), low + 1).view(-1, 1, 1)
    weights = (1 - (place + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((place >= low.view(-1, 1, 1)) & (place < high))
    return weights / weights.sum(2, keepdim=True)
