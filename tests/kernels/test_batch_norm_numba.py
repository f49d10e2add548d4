"""The fused batch norm on a CPU, compiled by numba, against fp64 and plain torch."""

import copy
import math

import numpy as np
import pytest
import torch

from fastsiam.kernels import batch_norm, batch_norm_numba, norm_rows_numba
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.residual import fuse_residual_blocks
from tests.support import norms
from tests.support.norms import FORMS, assert_errs_little, draw, in_fp64, ours, results, theirs

FLOATS = [torch.float32, torch.bfloat16]
# 70 channels leave the last tile of 14 rows unfilled; 4 channels have two parts of 64 tiles; 1,030 fill a tile each.
SHAPES = {"70": (3, 70, 5, 4), "4": (2, 4, 91, 103), "1030": (2, 1030, 3, 3)}


@pytest.fixture
def without_triton(monkeypatch):
    """Triton's kernels, which the interpreter would run here, fail."""
    for name in ("statistics_op", "apply_op", "reduce_op", "apply_backward_op"):
        monkeypatch.setattr(batch_norm, name, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_errs_by_at_most_twice_what_plain_torch_errs(form, dtype, shape, without_triton):
    assert_errs_little(form, draw(form, dtype, shape=SHAPES[shape]), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_three_views_are_three_calls(form, without_triton):
    drawn = draw(form, torch.float32, 3)
    mine, exact = results(form, drawn, ours(form)), results(form, in_fp64(drawn), theirs(form))
    assert mine[3][2] == exact[3][2] == 3
    for found, expected in zip(mine[:3], exact[:3], strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5, check_dtype=False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_number_of_threads_changes_nothing(dtype):
    form = "two norms, two users"
    drawn = draw(form, dtype, shape=SHAPES["4"])
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(form, drawn, ours(form)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_it_is_given_bf16_and_computes_fp32_too():
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    assert (batch_norm_numba.takes(x), batch_norm_numba.computes(x)) == (False, True)
    assert batch_norm_numba.takes(x.bfloat16())
    for other in (x.double(), x.half(), x.bfloat16().contiguous(), x.bfloat16()[:, :, 0, 0], x.bfloat16().to("meta")):
        assert not batch_norm_numba.takes(other)
    channels = norm_rows_numba.MOST_CHANNELS
    most = torch.empty(1, channels, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert batch_norm_numba.takes(most)
    assert not batch_norm_numba.takes(torch.cat([most, most], 1))


def test_a_large_mean_does_not_cancel():
    """Mean 1000 and spread 0.1 in fp32: the mean of squares minus the square of the mean would miss the variance."""
    x = 1000 + 0.1 * torch.randn(4, 8, 90, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.float().contiguous(memory_format=torch.channels_last)
    variance, mean = torch.var_mean(x.double().unflatten(0, (2, -1)), (1, 3, 4), correction=0)
    found = batch_norm_numba.statistics_op(x, 2).double()
    # Half the distance of fp32 numbers at 1000.
    torch.testing.assert_close(found[0], mean, atol=3.1e-5, rtol=0)
    torch.testing.assert_close(found[1], variance, atol=0, rtol=2e-6)


def test_one_far_value_does_not_spoil_the_variance():
    """The first value of a channel stands 500 spreads off, as a corner with its padding can."""
    x = 1 + 0.01 * torch.randn(2, 4, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 0, 0] = -4
    x = x.float().contiguous(memory_format=torch.channels_last)
    variance = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(batch_norm_numba.statistics_op(x, 1)[1, 0].double(), variance, atol=0, rtol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_handed_on(value, dtype):
    norms.assert_nan_stays_in_its_channel_and_view(value, dtype)


def test_bf16_is_rounded_to_the_nearest_with_ties_to_even():
    """Every bf16 times 1 + 2^-9 in fp32, and what lies halfway between two."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    halfway = (x.float().view(torch.int32) + 0x8000).view(torch.float32)
    values = torch.cat([x.float(), x.float() * (1 + 2**-9), halfway])
    # Zero is left out: one below zero comes out above.
    values = values[values.isfinite() & (values != 0)]
    out = np.empty(len(values), np.uint16)
    norm = norm_rows_numba.repeated(np.float32([[0], [1], [0]]), 4096)
    for at in range(0, len(values), 4096):
        norm_rows_numba.normalise(values[at : at + 4096].numpy(), norm, np.float32(-np.inf), out[at : at + 4096])
    assert torch.equal(torch.from_numpy(out).view(torch.int16), values.to(torch.bfloat16).view(torch.int16))


def test_gradients_may_come_without_memory_of_their_own():
    norms.assert_takes_gradients_without_memory()


def test_what_a_batch_cannot_give_raises_and_leaves_the_statistics():
    norms.assert_refuses_what_a_batch_cannot_give()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_step_of_torchvisions_network_is_the_plain_one(name, monkeypatch, without_triton):
    """In bf16 as near to the step in fp64 as plain layers are."""
    from torchvision import models

    torch.manual_seed(0)
    plainly = split_statistics(getattr(models, name)(num_classes=5), 2)
    fused = fuse_residual_blocks(copy.deepcopy(plainly))
    x = torch.randn(8, 3, 64, 64)

    def step(network, images):
        network = network.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=images.dtype == torch.float32):
            out = network(images.contiguous(memory_format=torch.channels_last))
        out.double().square().sum().backward()
        gradients = [parameter.grad.double().flatten() for parameter in network.parameters()]
        moved = torch.cat([buffer.double().flatten() for buffer in network.buffers()])
        return torch.cat([out.detach().double().flatten(), *gradients]), moved

    exact, exactly_moved = step(copy.deepcopy(plainly).double(), x.double())
    calls = []
    apply_op = batch_norm_numba.apply_op
    monkeypatch.setattr(batch_norm_numba, "apply_op", lambda *given: calls.append(0) or apply_op(*given))
    mine, moved = step(fused, x)
    assert len(calls) == {"resnet18": 17, "resnet50": 49}[name]
    monkeypatch.setattr(batch_norm_numba, "takes", lambda x: False)
    theirs, plainly_moved = step(plainly, x)
    assert (mine - exact).norm() <= 1.1 * (theirs - exact).norm()
    assert (moved - exactly_moved).norm() <= 1.1 * (plainly_moved - exactly_moved).norm()
