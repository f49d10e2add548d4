"""The gathering max pool, under Triton's interpreter or on a GPU, against F.max_pool2d in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastsiam.kernels import max_pool, pool
from tests.support.numerics import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu

# A ResNet's; windows side by side; windows that overlap everywhere; a border on all sides.
WINDOWS = [(3, 2, 1, 9, 12, 70), (2, 2, 0, 8, 8, 5), (3, 1, 1, 5, 6, 16), (5, 3, 2, 11, 13, 8)]


def draw(channels, height, width, dtype=torch.float64):
    """Values with a single decimal, so that many are equal; a NaN, and an image of -inf."""
    x = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.round(decimals=1)
    x[0, 0, 2, 2], x[1] = math.nan, -math.inf
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize(("kernel_size", "stride", "padding", "height", "width", "channels"), WINDOWS)
def test_values_and_gradients_are_torchs(kernel_size, stride, padding, height, width, channels):
    x = draw(channels, height, width)
    ours, _ = pool.max_pool_op(x, kernel_size, stride, padding)
    theirs = F.max_pool2d(x, kernel_size, stride, padding)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    (mine,), (reference,) = (
        gradients((ours * grad).nan_to_num().sum(), [x]),
        gradients((theirs * grad).nan_to_num().sum(), [x]),
    )
    torch.testing.assert_close(mine, reference, atol=1e-14, rtol=0, equal_nan=True)
    assert mine.stride() == x.stride()


def test_in_bf16_gradients_add_up_in_fp32():
    """A place of a 3x3 pool of stride 2 wins up to four windows; the interpreter truncates the result to bf16."""
    x = draw(16, 9, 9, torch.bfloat16)
    with torch.no_grad():
        x.copy_(torch.arange(9 * 9).view(9, 9) % 7)
    grad = torch.rand(3, 16, 5, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    (mine,) = gradients((pool.max_pool_op(x, 3, 2, 1)[0] * grad).sum(), [x])
    exact = x.detach().double().requires_grad_()
    (truth,) = gradients((F.max_pool2d(exact, 3, 2, 1) * grad).sum(), [exact])
    assert ((mine - truth).abs() <= 2**-7 * truth.abs()).all()


def test_what_the_kernel_does_not_take_is_torchs():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(max_pool(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1))


def test_opcheck():
    x = draw(5, 6, 6, torch.float32).detach()
    x = x.nan_to_num(0, 0, 0)
    assert set(torch.library.opcheck(pool.max_pool_op, (x, 3, 2, 1)).values()) == {"SUCCESS"}
    y, winners = pool.max_pool_op(x, 3, 2, 1)
    checks = torch.library.opcheck(pool.max_pool_backward_op, (y, winners, 6, 6, 3, 2, 1))
    assert set(checks.values()) == {"SUCCESS"}
