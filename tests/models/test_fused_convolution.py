"""Batch norm, ReLU and the convolution behind them as one step, under Triton's interpreter or on a GPU."""

import copy

import pytest
import torch
from torch import nn

from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.fused_convolution import fused_convolution
from fastsiam.models.fused_norm import fused_norm
from tests.support.kernels_on_cpu import mend_bfloat16
from tests.support.numerics import assert_as_exact_as_plain, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu

VIEWS, CHANNELS, SIZE = 2, 12, 7
# What stands behind a batch norm in ResNets: plain, strided, dilated (timm's output_stride), and ResNeXts' groups.
CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilation 2, 3 groups": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 3},
    "uneven": {"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 2)},
}


class Subclass(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


# Their inputs are kept.
OTHERS = {
    "a bias": lambda: nn.Conv2d(CHANNELS, 6, 3),
    "reflected": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1, padding_mode="reflect", bias=False),
    "a word for the padding": lambda: nn.Conv2d(CHANNELS, 6, 3, padding="same", bias=False),
    "a subclass": lambda: Subclass(CHANNELS, 6, 3, bias=False),
}


def draw(convolution, dtype=torch.float64, seed=0):
    """A batch norm with random affine parts, the convolution, and images of a mean that is not 0."""
    torch.manual_seed(seed)
    norm = split_statistics(nn.BatchNorm2d(CHANNELS, momentum=0.3), VIEWS)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x = 1 + 2 * torch.randn(3 * VIEWS, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    x = x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    modules = norm.to(DEVICE), convolution.to(DEVICE, memory_format=torch.channels_last)
    return (*modules, x) if dtype != torch.float64 else (*(module.double() for module in modules), x)


def drawn(name, dtype=torch.float64):
    torch.manual_seed(1)
    return draw(nn.Conv2d(CHANNELS, 6, **CONVOLUTIONS[name], bias=False), dtype)


def plain(norm, convolution, x):
    """View by view, without the kernels."""
    alone = nn.BatchNorm2d(CHANNELS, norm.eps, norm.momentum)
    alone._parameters, alone._buffers = norm._parameters, norm._buffers
    return convolution(torch.relu(torch.cat([alone(view) for view in x.chunk(VIEWS)])))


def results(function, norm, convolution, x):
    """The output; the gradients of the images, and of the weights; running statistics."""
    norm, convolution = copy.deepcopy(norm), copy.deepcopy(convolution)
    out = function(norm, convolution, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
    of_x, *of_weights = gradients((out * weights).sum(), [x, *norm.parameters(), *convolution.parameters()])
    return out.detach(), of_x, of_weights, list(norm.buffers())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_in_fp64_it_is_plain_torch(name):
    given = drawn(name)
    found, expected = results(fused_convolution, *given), results(plain, *given)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert found[3][2] == VIEWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_errs_by_at_most_twice_what_plain_torch_errs(name, dtype, monkeypatch):
    """Under autocast, as images and outputs are in half precision and weights in fp32."""
    mend_bfloat16(monkeypatch)
    norm, convolution, x = drawn(name, dtype)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        found, other = (results(function, norm, convolution, x) for function in (fused_convolution, plain))
    wide = x.detach().double().requires_grad_()
    exact = results(plain, copy.deepcopy(norm).double(), copy.deepcopy(convolution).double(), wide)
    assert_as_exact_as_plain(found[:2], exact[:2], other[:2], dtype)
    assert_as_exact_as_plain(found[2], exact[2], other[2], torch.float32)
    for buffer, truth, theirs in zip(found[3], exact[3], other[3], strict=True):
        assert buffer.dtype == theirs.dtype
        assert (buffer - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2**-23 * truth.abs().max()


def kept_by(function, norm, convolution, x):
    """Numbers of the images that the autograd graph keeps, each tensor once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        function(norm, convolution, x)
    return [tensor.data_ptr() == x.data_ptr() for tensor in kept.values() if tensor.shape == x.shape]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_x_alone_is_kept(name):
    given = drawn(name)
    assert kept_by(fused_convolution, *given) == [True]
    assert len(kept_by(lambda norm, convolution, x: convolution(fused_norm([norm], [x], relu=True)), *given)) == 2


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_called_as_they_are(name):
    torch.manual_seed(1)
    given = draw(OTHERS[name]())
    torch.testing.assert_close(results(fused_convolution, *given), results(plain, *given), atol=1e-12, rtol=1e-12)
    assert len(kept_by(fused_convolution, *given)) >= 2


def test_a_frozen_convolution_has_no_gradient_and_what_is_before_it_has():
    norm, convolution, x = drawn("3x3")
    of_x, of_norm = gradients(fused_convolution(norm, convolution, x).square().sum(), [x, norm.weight])
    convolution.requires_grad_(False)
    frozen = fused_convolution(norm, convolution, x)
    torch.testing.assert_close(gradients(frozen.square().sum(), [x, norm.weight]), (of_x, of_norm))
    assert convolution.weight.grad is None


def test_gradients_may_come_without_memory_of_their_own():
    """That of a sum over places is one number, expanded."""
    norm, convolution, x = drawn("3x3")
    mine = gradients(fused_convolution(norm, convolution, x).sum(), [x, convolution.weight])
    theirs = gradients(plain(norm, convolution, x).sum(), [x, convolution.weight])
    torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


def test_what_a_batch_cannot_give_raises_and_leaves_the_statistics():
    norm, convolution, x = drawn("1x1")
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="a batch of 3 does not divide into 2 views"):
        fused_convolution(norm, convolution, x[:3])
    torch.testing.assert_close(norm.state_dict(), before, atol=0, rtol=0)
