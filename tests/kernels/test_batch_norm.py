"""The fused batch norm, under Triton's interpreter or on a GPU, against fp64 and plain torch."""

import copy
import functools
import math

import pytest
import torch

from fastsiam.kernels import batch_norm
from fastsiam.models.fused_norm import fused_norm
from tests.support import norms
from tests.support.kernels_on_cpu import leave_numba_out
from tests.support.norms import FORMS, assert_errs_little, in_fp64, ours, results, theirs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
draw = functools.partial(norms.draw, device=DEVICE)


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    leave_numba_out(monkeypatch)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_errs_by_at_most_twice_what_plain_torch_errs(form, dtype):
    assert_errs_little(form, draw(form, dtype), dtype)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_in_fp64_it_is_plain_torch(form, views):
    drawn = in_fp64(draw(form, torch.float64, views, shape=(2, 6, 3, 3)))
    mine, plainly = results(form, drawn, ours(form)), results(form, drawn, theirs(form))
    torch.testing.assert_close(mine, plainly, atol=1e-13, rtol=1e-12)
    assert mine[3][2] == views


def test_a_large_mean_does_not_cancel():
    """Mean 1000 and spread 0.1 in fp32: the mean of squares minus the square of the mean would miss the variance."""
    x = 1000 + 0.1 * torch.randn(4, 8, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(DEVICE, torch.float32).contiguous(memory_format=torch.channels_last)
    variance, mean = torch.var_mean(x.double().unflatten(0, (2, -1)), (1, 3, 4), correction=0)
    found = batch_norm.statistics_op(x, 2).double()
    torch.testing.assert_close(found[0], mean, atol=1.3e-4, rtol=0)
    # A value's rounding is 3e-5 of a spread of 0.1; 1,600 of them.
    torch.testing.assert_close(found[1], variance, atol=0, rtol=5e-5)
    squares = (x**2).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2
    assert ((squares - variance.mean(0)) / variance.mean(0)).abs().max() > 0.1


def test_one_far_value_does_not_spoil_the_variance():
    """The first value of a channel stands 500 spreads off, as a corner with its padding can."""
    x = 1 + 0.01 * torch.randn(2, 4, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 0, 0] = -4
    x = x.to(DEVICE, torch.float32).contiguous(memory_format=torch.channels_last)
    variance = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(batch_norm.statistics_op(x, 1)[1, 0].double(), variance, atol=0, rtol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_handed_on(value):
    norms.assert_nan_stays_in_its_channel_and_view(value, torch.float32, DEVICE)


def test_a_layer_is_one_launch_of_each_kernel(monkeypatch):
    launches = []

    def counting(name):
        kernel = getattr(batch_norm, name)

        class Counting:
            def __getitem__(self, grid):
                launches.append(name)
                return kernel[grid]

        return Counting()

    names = ["statistics_kernel", "apply_kernel", "reduce_kernel", "apply_backward_kernel"]
    for name in names:
        monkeypatch.setattr(batch_norm, name, counting(name))
    results("join, two users", draw("join, two users", torch.float32), ours("join, two users"))
    assert launches == names


def test_programs_add_up_in_the_same_order_and_leave_the_counter_at_zero(monkeypatch):
    """60 rows of 70 channels in parts of a few rows each; the counter is the layer's."""
    form = "two norms, two users"
    drawn = in_fp64(draw(form, torch.float32))
    whole = results(form, drawn, ours(form))
    monkeypatch.setattr(batch_norm, "LANES", 128)
    monkeypatch.setattr(batch_norm, "PARTS_BLOCK", 4)
    assert batch_norm._reduction(drawn[1][0], 2, batch_norm.DEEP)[0] == (2, 15, 2)
    first = results(form, drawn, ours(form))
    torch.testing.assert_close(first, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(first, results(form, drawn, ours(form)), atol=0, rtol=0)
    layers = [copy.deepcopy(layer) for layer in drawn[0]]
    for _ in range(2):
        for out in fused_norm(layers, drawn[1], relu=True, forks=True):
            out.sum().backward(retain_graph=True)
        assert not any(layer.counter.any() for layer in layers)


def test_without_a_counter_of_its_own_the_sums_are_the_same():
    x = draw("norm", torch.float32)[1][0].detach()
    counter = batch_norm.counter_of(70, 2, DEVICE)
    assert torch.equal(batch_norm.statistics_op(x, 2), batch_norm.statistics_op(x, 2, counter))
    # One for fewer views does not reach.
    assert torch.equal(batch_norm.statistics_op(x, 6), batch_norm.statistics_op(x, 6, counter))


def test_what_a_batch_cannot_give_raises_and_leaves_the_statistics():
    norms.assert_refuses_what_a_batch_cannot_give(DEVICE)


def test_gradients_may_come_without_memory_of_their_own():
    norms.assert_takes_gradients_without_memory(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_applied_again_it_is_the_same_to_the_bit(dtype):
    (layer,), (x,), _, _ = draw("norm, relu", dtype)
    own = x.detach(), batch_norm.statistics_op(x.detach(), 2), layer.weight.detach(), layer.bias.detach()
    first = fused_norm([layer], [x], relu=True).detach()
    moved = copy.deepcopy(layer.state_dict())
    assert torch.equal(batch_norm.apply_again_op(*own, layer.eps), first)
    torch.testing.assert_close(layer.state_dict(), moved, atol=0, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_two_passes_add_up(form):
    """In place: no two parameters have their gradients in one memory."""
    layers, xs, residual, weights = in_fp64(draw(form, torch.float64, shape=(2, 6, 3, 3)))
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    found = []
    for _ in range(2):
        outs = ours(form)(layers, xs, residual)
        (outs[0] if isinstance(outs, tuple) else outs).backward(weights[0])
        found.append([parameter.grad.clone() for parameter in parameters])
    for once, twice in zip(*found, strict=True):
        assert once.abs().max() > 1e-3
        torch.testing.assert_close(twice, 2 * once)


def test_opcheck():
    layers, (x_a, x_b), _, _ = draw("two norms, two users", torch.float32)
    xs = [x_a.detach(), x_b.detach()]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(op, *arguments):
        assert set(torch.library.opcheck(op, arguments, test_utils=checks).values()) == {"SUCCESS"}

    check(batch_norm.statistics_op, xs[0], 2, layers[0].counter)
    statistics = [batch_norm.statistics_op(x, 2) for x in xs]
    of_layers = xs, statistics, [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    running = [buffer for layer in layers for buffer in layer.buffers()]
    check(batch_norm.apply_op, *of_layers, [1e-5, 1e-3], xs[1], True, running, [0.1, 0.2], 60)
    check(batch_norm.apply_op, *of_layers, [1e-5, 1e-3], None, True, [], [], 60)
    y = batch_norm.apply_op(*of_layers, [1e-5, 1e-3], None, True, [], [], 60)
    one = [tensors[0] for tensors in of_layers]
    check(batch_norm.apply_again_op, *one, 1e-5)
    check(batch_norm.reduce_op, [y, xs[0]], *of_layers, [1e-5, 1e-3], y, True, layers[0].counter)
    check(batch_norm.reduce_op, [y], *([tensors[0]] for tensors in of_layers), [1e-5], None, True)
    sums, g = batch_norm.reduce_op([y], *of_layers, [1e-5, 1e-3], y, True)
    check(batch_norm.apply_backward_op, g, *of_layers, [1e-5, 1e-3], sums, sums, 60, False)
