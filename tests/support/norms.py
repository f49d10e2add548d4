"""Fused batch norms beside plain ones: layers and images, what a step of them gives, and how far that is from fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.fused_norm import fused_norm
from tests.support.numerics import assert_as_exact_as_plain, gradients

# How many batch norms, whether there is a residual, whether ReLU follows, whether the result has two users.
FORMS = {
    "norm": (1, False, False, False),
    "norm, relu": (1, False, True, False),
    "norm, relu, two users": (1, False, True, True),
    "join": (1, True, True, False),
    "join, two users": (1, True, True, True),
    "two norms, two users": (2, False, True, True),
    "two norms and a residual": (2, True, True, False),
}


def draw(form, dtype, views=2, shape=(3, 70, 5, 4), seed=0, mean=1.0, device="cpu"):
    """Layers with random affine parts, their images, the residual or None, and weights of each user of the result.

    70 channels are one block of 64 and a part of another; 60 rows a view do not fill a tile of 64.
    """
    count, has_residual, _, two_users = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    shape = (views * shape[0], *shape[1:])

    def images(spread=1.0, offset=0.0):
        x = offset + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()

    layers = [split_statistics(nn.BatchNorm2d(shape[1], momentum=0.3), views) for _ in range(count)]
    for layer in layers:
        nn.init.normal_(layer.weight, 1, 0.3, generator=generator)
        nn.init.normal_(layer.bias, generator=generator)
    layers = [layer.to(device) for layer in layers]
    xs = [images(2.0, mean) for _ in range(count)]
    weights = [images().detach() for _ in range(1 + two_users)]
    return layers, xs, images() if has_residual else None, weights


def plain(layers, xs, residual, relu):
    """View by view in the images' dtype, as the libraries' blocks do it."""
    out = 0
    for layer, x in zip(layers, xs, strict=True):
        statistics = layer.running_mean, layer.running_var
        out = out + torch.cat(
            [
                F.batch_norm(view, *statistics, layer.weight, layer.bias, True, layer.momentum, layer.eps)
                for view in x.chunk(layer.num_views)
            ]
        )
        layer.num_batches_tracked.add_(layer.num_views)
    out = out if residual is None else out + residual
    return torch.relu(out) if relu else out


def results(form, drawn, function):
    """The output, gradients, and running statistics after the step."""
    layers, xs, residual, weights = drawn
    layers = copy.deepcopy(layers)
    outs = function(layers, xs, residual)
    outs = outs if isinstance(outs, tuple) else (outs,) * len(weights)
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
    inputs = [*xs, *([] if residual is None else [residual])]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    found = gradients(loss, [*inputs, *parameters])
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    return outs[0].detach(), found[: len(inputs)], found[len(inputs) :], buffers


def ours(form):
    _, _, relu, two_users = FORMS[form]
    return lambda layers, xs, residual: fused_norm(layers, xs, residual, relu=relu, forks=two_users)


def theirs(form):
    return lambda layers, xs, residual: plain(layers, xs, residual, FORMS[form][2])


def in_fp64(drawn):
    layers, xs, residual, weights = drawn
    xs = [x.detach().double().requires_grad_() for x in xs]
    residual = None if residual is None else residual.detach().double().requires_grad_()
    return [copy.deepcopy(layer).double() for layer in layers], xs, residual, [weight.double() for weight in weights]


def assert_errs_little(form, drawn, dtype):
    """By at most twice what plain torch errs, against fp64: output, gradients and running statistics."""
    mine, plainly = results(form, drawn, ours(form)), results(form, drawn, theirs(form))
    exact = results(form, in_fp64(drawn), theirs(form))
    assert_as_exact_as_plain([mine[0], *mine[1]], [exact[0], *exact[1]], [plainly[0], *plainly[1]], dtype)
    assert_as_exact_as_plain(mine[2], exact[2], plainly[2], torch.float32)
    for buffer, truth, other in zip(mine[3], exact[3], plainly[3], strict=True):
        assert buffer.dtype == other.dtype
        assert (buffer - truth).abs().max() <= 2 * (other - truth).abs().max() + 2**-23 * truth.abs().max()


def assert_nan_stays_in_its_channel_and_view(value, dtype, device="cpu"):
    """What one value that is not finite makes of a join; ReLU lets NaN pass."""
    drawn = draw("join, two users", dtype, device=device)
    with torch.no_grad():
        drawn[1][0][0, 3, 1, 1] = value
    out, (of_x, of_residual), _, _ = results("join, two users", drawn, ours("join, two users"))
    assert out[:3, 3].isnan().all()
    assert of_x[:3, 3].isnan().all()
    for tensor in (out, of_x, of_residual):
        assert not tensor[3:].isnan().any()
        assert not tensor[:, :3].isnan().any()


def assert_takes_gradients_without_memory(device="cpu"):
    """That of a sum over places is one number, expanded."""
    layers, xs, _, _ = draw("norm, relu", torch.float32, device=device)
    mine = gradients(fused_norm(layers, xs, relu=True).sum(), xs)
    torch.testing.assert_close(mine, gradients(plain(layers, xs, None, True).sum(), xs), atol=1e-5, rtol=1e-5)


def assert_refuses_what_a_batch_cannot_give(device="cpu"):
    """With the running statistics as they were."""
    layer = split_statistics(nn.BatchNorm2d(3), 2).to(device)
    before = copy.deepcopy(layer.state_dict())
    for shape, message in (
        ((3, 3, 2, 2), "a batch of 3 does not divide into 2 views"),
        ((2, 3, 1, 1), r"one value a channel and view in \[2, 3, 1, 1\]"),
    ):
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=message):
            fused_norm([layer], [x])
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)
