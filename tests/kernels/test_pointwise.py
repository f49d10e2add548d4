"""The tail of a Bottleneck without its two sides, under Triton's interpreter or on a GPU, against fp64 and torch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.kernels import pointwise
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.fused_pointwise import Shortcut, fused_pointwise
from tests.support.kernels_on_cpu import mend_bfloat16
from tests.support.numerics import assert_as_exact_as_plain, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["identity", "identity, two users", "norm, two users"]


def draw(form, views=2, shape=(3, 20, 5, 5), wide=140, bias=0.0, seed=0):
    """In fp64 the layers norm, convolution, after [, the shortcut's norm], images, shortcut, weights of the users.

    75 rows a view are a tile of 64 and a part of another; 140 channels are a block of 128 and a part of another.
    """
    generator = torch.Generator().manual_seed(seed)

    def images(channels, spread, offset):
        x = offset + spread * torch.randn(
            views * shape[0], channels, *shape[2:], generator=generator, dtype=torch.float64
        )
        return x.to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()

    layers = [nn.BatchNorm2d(shape[1], momentum=0.3), nn.Conv2d(shape[1], wide, 1, bias=False), nn.BatchNorm2d(wide)]
    layers += [nn.BatchNorm2d(wide)] if form.startswith("norm") else []
    for layer in layers:
        is_norm = isinstance(layer, nn.BatchNorm2d)
        nn.init.normal_(layer.weight, 1.0 if is_norm else 0.0, 0.3, generator=generator)
        if is_norm:
            nn.init.normal_(layer.bias, generator=generator)
    nn.init.normal_(layers[0].bias, bias, 1.0, generator=generator)
    layers = [split_statistics(layer, views).to(DEVICE).double() for layer in layers]
    x, shortcut = images(shape[1], 2.0, 1.0), images(wide, 1.5, 0.5)
    with torch.no_grad():
        # What stands at the ReLU's bend falls to either side by rounding, and tells nothing.
        apart = plain(copy.deepcopy(layers), x, shortcut, relu=lambda image: image).abs() > 0.05
    weights = [images(wide, 1.0, 0.0).detach() * apart for _ in range(2 if "two" in form else 1)]
    return layers, x, shortcut, weights


def to(drawn, dtype):
    """Images in `dtype`, what trains in at least fp32, with values that `dtype` has; and the same in fp64."""
    kept = torch.promote_types(dtype, torch.float32)
    drawn = copy.deepcopy(drawn[0]), *drawn[1:]
    for layer in drawn[0]:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.to(dtype)
        layer.to(kept)

    def copied(of_layers, of_images):
        layers, x, shortcut, weights = drawn
        images = [image.detach().to(dtype).to(of_images) for image in (x, shortcut, *weights)]
        x, shortcut = (image.requires_grad_() for image in images[:2])
        return [copy.deepcopy(layer).to(of_layers) for layer in layers], x, shortcut, images[2:]

    return copied(kept, dtype), copied(torch.float64, torch.float64)


def ours(layers, x, shortcut, weights):
    norm, convolution, after, *more = layers
    shortcut = Shortcut(more[0], shortcut) if more else shortcut
    return fused_pointwise(norm, convolution, after, x, shortcut, forks=len(weights) == 2)


def plain(layers, x, shortcut, weights=None, relu=torch.relu):
    """View by view in the images' dtype, as the libraries' blocks do it."""

    def normed(layer, images):
        layer.num_batches_tracked.add_(layer.num_views)
        running = layer.running_mean, layer.running_var
        views = images.chunk(layer.num_views)
        rest = layer.weight, layer.bias, True, layer.momentum, layer.eps
        return torch.cat([F.batch_norm(view, *running, *rest) for view in views])

    norm, convolution, after, *more = layers
    inner = F.conv2d(torch.relu(normed(norm, x)), convolution.weight.to(x.dtype))
    return relu(normed(after, inner) + (normed(more[0], shortcut) if more else shortcut))


def results(function, drawn):
    """The output, gradients of images and of parameters, and running statistics after the step."""
    layers, x, shortcut, weights = drawn
    outs = function(layers, x, shortcut, weights)
    outs = outs if isinstance(outs, tuple) else (outs,) * len(weights)
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    found = gradients(loss, [x, shortcut, *parameters])
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    return [outs[0].detach(), *found[:2]], found[2:], buffers


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_errs_by_at_most_twice_what_plain_torch_errs(form, dtype, monkeypatch):
    mend_bfloat16(monkeypatch)
    rounded, exact = to(draw(form), dtype)
    mine, plainly = results(ours, copy.deepcopy(rounded)), results(plain, rounded)
    exact = results(plain, exact)
    assert_as_exact_as_plain(mine[0], exact[0], plainly[0], dtype)
    assert_as_exact_as_plain(mine[1], exact[1], plainly[1], torch.float32)
    for buffer, truth, other in zip(mine[2], exact[2], plainly[2], strict=True):
        assert buffer.dtype == other.dtype
        assert (buffer - truth).abs().max() <= 2 * (other - truth).abs().max() + 2**-22 * truth.abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_the_gradient_at_a_join_errs_by_at_most_twice_what_plain_torch_errs(normed, dtype, monkeypatch):
    """That of a convolution of 20 to 140 channels and of another user, below a ReLU; 75 rows in each of two views."""
    mend_bfloat16(monkeypatch)
    generator = torch.Generator().manual_seed(0)

    def images(channels):
        x = torch.randn(6, channels, 5, 5, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        return x.contiguous(memory_format=torch.channels_last)

    grad, (carried, y, x) = images(20), (images(140) for _ in range(3))
    weight = torch.randn(20, 140, generator=generator).to(DEVICE, dtype)
    statistics = torch.randn(2, 2, 140, generator=generator).to(DEVICE)

    def below(kind):
        through = F.conv_transpose2d(grad.to(kind), weight.to(kind)[:, :, None, None])
        return torch.where(y > 0, through + carried.to(kind), 0.0)

    m, partial = pointwise.join_dgrad_op(grad, weight, carried, y, statistics, x if normed else None)
    assert_as_exact_as_plain([m], [below(torch.float64)], [below(dtype)], dtype)
    m, away = m.double(), x.double() - statistics[0].double().repeat_interleave(3, 0)[:, :, None, None]
    expected = [m, m * away] if normed else [m]
    expected = torch.stack([one.unflatten(0, (2, 3)).sum((1, 3, 4)) for one in expected], 1)
    torch.testing.assert_close(partial.sum(1).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_in_fp64_it_is_plain_torch(form, views):
    _, drawn = to(draw(form, views, (2, 5, 4, 4), 18), torch.float64)
    mine, plainly = results(ours, copy.deepcopy(drawn)), results(plain, drawn)
    torch.testing.assert_close(mine, plainly, atol=1e-12, rtol=1e-10)


def test_autocast_leaves_what_is_of_statistics_in_fp32():
    """In half precision their products would lose three digits."""
    rounded, _ = to(draw("norm, two users", shape=(2, 5, 4, 4), wide=18), torch.float16)
    expected = results(ours, copy.deepcopy(rounded))
    with torch.autocast(DEVICE, torch.float16):
        found = results(ours, rounded)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_large_mean_before_the_convolution_does_not_cancel():
    """Means of 1,000 after the first batch norm, in fp32: squares of z less the square of its mean would be noise."""
    rounded, exact = to(draw("identity", bias=1000.0), torch.float32)
    mine, plainly = results(ours, copy.deepcopy(rounded)), results(plain, rounded)
    exact = results(plain, exact)
    for found, truth, other in zip(mine[0], exact[0], plainly[0], strict=True):
        error, of_plain = (found - truth).abs().max(), (other - truth).abs().max()
        assert error <= 2 * of_plain
    # Running variances: the convolution's sums of 20 terms of 1,000 lose the digits that z keeps.
    assert (mine[2][4] - exact[2][4]).abs().max() <= (plainly[2][4] - exact[2][4]).abs().max()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_handed_on(value):
    """Those of one view stay there; ReLU lets NaN pass."""
    _, drawn = to(draw("identity", shape=(2, 5, 4, 4), wide=18), torch.float64)
    with torch.no_grad():
        drawn[1][0, 3, 1, 1] = value
    (out, of_x, of_shortcut), _, _ = results(ours, drawn)
    assert out[:2].isnan().all()
    assert of_x[:2, 3].isnan().all()
    for tensor in (out, of_x, of_shortcut):
        assert not tensor[2:].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_two_passes_add_up(form):
    """In place: no two parameters have their gradients in one memory."""
    _, (layers, x, shortcut, weights) = to(draw(form, shape=(2, 5, 3, 3), wide=18), torch.float64)
    parameters, found = [parameter for layer in layers for parameter in layer.parameters()], []
    for _ in range(2):
        outs = ours(layers, x, shortcut, weights)
        (outs[0] if isinstance(outs, tuple) else outs).backward(weights[0])
        found.append([parameter.grad.clone() for parameter in parameters])
    for once, twice in zip(*found, strict=True):
        assert once.abs().max() > 1e-3
        torch.testing.assert_close(twice, 2 * once)


def test_rows_and_columns_in_several_parts_add_up_in_the_same_order(monkeypatch):
    """25 rows in parts of 16, 20 channels in blocks of 16: of a Gram matrix's blocks half have two operands."""
    _, drawn = to(draw("norm, two users", shape=(1, 20, 5, 5), wide=24), torch.float64)
    whole = results(ours, copy.deepcopy(drawn))
    for name in ("ROWS_PRODUCT", "JOIN", "DGRAD"):
        monkeypatch.setattr(pointwise, f"TILE_OF_{name}", (16, 16, 16, 4))
    assert pointwise._over_rows(drawn[1], torch.empty(3, 2, 20), 20)[0] == (4, 2, 2)
    first = results(ours, copy.deepcopy(drawn))
    torch.testing.assert_close(first, whole, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(first, results(ours, drawn), atol=0, rtol=0)


def test_what_a_batch_cannot_give_raises_and_leaves_the_statistics():
    layers, x, shortcut, weights = draw("identity", views=1, shape=(1, 5, 2, 2), wide=18)
    before = copy.deepcopy([layer.state_dict() for layer in layers])
    with pytest.raises(ValueError, match=r"one value a channel and view in \[1, 5, 1, 1\]"):
        ours(layers, *(images[:, :, :1, :1] for images in (x, shortcut)), weights)
    torch.testing.assert_close([layer.state_dict() for layer in layers], before, atol=0, rtol=0)


@pytest.mark.slow
def test_opcheck():
    rounded, _ = to(draw("identity", shape=(2, 5, 3, 3), wide=18), torch.float32)
    layers, x, shortcut = rounded[0], rounded[1].detach(), rounded[2].detach()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(op, *arguments):
        assert set(torch.library.opcheck(op, arguments, test_utils=checks).values()) == {"SUCCESS"}

    affine, statistics = torch.rand(3, 2, 5, device=DEVICE), torch.rand(2, 2, 18, device=DEVICE)
    check(pointwise.gram_op, x, affine)
    check(pointwise.rows_product_op, shortcut, x, affine)
    check(pointwise.join_op, x, affine, layers[1].weight.detach().flatten(1), statistics, shortcut)
    factors = torch.rand(2, 18, 5, device=DEVICE), torch.rand(2, 5, 5, device=DEVICE), affine[0]
    check(pointwise.dgrad_op, shortcut, x, affine, affine[:2], *factors)
    back = torch.rand(5, 18, device=DEVICE)
    check(pointwise.join_dgrad_op, x, back, shortcut, shortcut, statistics, None)
    check(pointwise.join_dgrad_op, x, back, shortcut, shortcut, statistics, shortcut)
    running = [layers[2].running_mean, layers[2].running_var, layers[2].num_batches_tracked]
    check(pointwise.take_in_op, statistics, running, 0.1, 18)
