"""The loss against the paper's Algorithm 1, written out once more in NumPy and fp64."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsiam import kernels
from fastsiam.kernels import negative_cosine, reference
from tests.support.numerics import algorithm_1, assert_as_exact_as_plain, gradients, loop_distance

LOW = [torch.bfloat16, torch.float16]
SIZES = [(2, 3), (7, 16), (64, 256)]


def four(count, dim, dtype=torch.float64, seed=0, scale=1.0):
    """p1, p2, z1, z2 that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(4)
    ]


def loop_loss(p1, p2, z1, z2):
    """L = D(p1, z2) / 2 + D(p2, z1) / 2 of Algorithm 1."""
    p1, p2, z1, z2 = (x.detach().double().numpy() for x in (p1, p2, z1, z2))
    return loop_distance(p1, z2) / 2 + loop_distance(p2, z1) / 2


def closed_form_gradient(p, z):
    """d/dp of -mean cos(p, z) / 2: the part of z / |z| across p, over -2 N |p|."""
    p, z = p.detach().double().numpy(), z.detach().double().numpy()
    length = np.linalg.norm(p, axis=1, keepdims=True)
    p, z = p / length, z / np.linalg.norm(z, axis=1, keepdims=True)
    return -(z - (p * z).sum(1, keepdims=True) * p) / length / (2 * len(p))


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_those_of_algorithm_1_and_none_reaches_z(size):
    p1, p2, z1, z2 = inputs = four(*size)
    loss = negative_cosine(*inputs)
    assert loss.item() == pytest.approx(loop_loss(*inputs), abs=1e-14)
    ours = gradients(loss, inputs)
    assert ours[2:] == (None, None)
    torch.testing.assert_close(ours[:2], gradients(algorithm_1(*inputs), inputs)[:2], atol=1e-14, rtol=1e-12)
    np.testing.assert_allclose(ours[0], closed_form_gradient(p1, z2), atol=1e-14)
    np.testing.assert_allclose(ours[1], closed_form_gradient(p2, z1), atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_without_stop_gradient_all_four_get_autograds_gradients(size):
    p1, p2, z1, z2 = inputs = four(*size)
    loss = negative_cosine(*inputs, stop_gradient=False)
    assert loss.item() == pytest.approx(loop_loss(*inputs), abs=1e-14)
    ours = gradients(loss, inputs)
    theirs = gradients(algorithm_1(*inputs, stop_gradient=False), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-12)
    np.testing.assert_allclose(ours[2], closed_form_gradient(z1, p2), atol=1e-14)
    np.testing.assert_allclose(ours[3], closed_form_gradient(z2, p1), atol=1e-14)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
def test_inputs_of_low_precision_accumulate_in_fp32(dtype, stop_gradient):
    inputs = four(128, 512, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    plain_inputs = [x.detach().requires_grad_() for x in inputs]
    loss = negative_cosine(*inputs, stop_gradient=stop_gradient)
    exact = algorithm_1(*exact_inputs, stop_gradient)
    plain = algorithm_1(*(x.float() for x in plain_inputs), stop_gradient)
    assert loss.dtype == torch.float32
    ulp = torch.finfo(torch.float32).eps * abs(exact.item())
    assert abs(loss.item() - exact.item()) <= 2 * abs(plain.item() - exact.item()) + ulp
    found = gradients(loss, inputs), gradients(exact, exact_inputs), gradients(plain, plain_inputs)
    assert_as_exact_as_plain(*found, dtype)


def test_rows_whose_squares_overflow_half_precision_are_fine():
    inputs = four(16, 64, torch.float16, scale=1000.0)
    assert (inputs[0].detach() ** 2).isinf().any()
    assert negative_cosine(*inputs).item() == pytest.approx(loop_loss(*inputs), abs=1e-6)
    assert all(g.isfinite().all() for g in gradients(negative_cosine(*inputs), inputs[:2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_aligned_opposite_and_orthogonal_rows_give_the_ends_and_the_middle_of_the_range(dtype):
    p = four(9, 32, dtype)[0].detach()
    turned = torch.stack((-p[:, 1::2], p[:, ::2]), 2).flatten(1)
    tolerance = 1e-15 if dtype == torch.float64 else 2e-7
    for z, expected in ((3 * p, -1), (-p / 2, 1), (turned, 0)):
        assert negative_cosine(p, p, z, z).item() == pytest.approx(expected, abs=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_zeros_count_as_orthogonal_and_give_no_nan(dtype):
    inputs = four(6, 10, dtype)
    with torch.no_grad():
        inputs[0][0], inputs[1][2], inputs[2][2], inputs[3][4] = 0, 0, 0, 0
    loss = negative_cosine(*inputs, stop_gradient=False)
    kept_1, kept_2 = [1, 2, 3, 5], [0, 1, 3, 4, 5]
    p1, p2, z1, z2 = (x.detach().double().numpy() for x in inputs)
    expected = (4 * loop_distance(p1[kept_1], z2[kept_1]) + 5 * loop_distance(p2[kept_2], z1[kept_2])) / 12
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    plain = [x.detach().requires_grad_() for x in inputs]
    p1, p2, z1, z2 = plain
    theirs = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
    for ours, other in zip(gradients(loss, inputs), gradients(theirs, plain), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, other, rtol=0.1 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 8), (4, 8), (4, 8), (4, 9)],
        [(4, 8), (5, 8), (4, 8), (5, 8)],
        [(4, 1), (4, 8), (4, 8), (4, 8)],
        [(8,)] * 4,
        [(2, 4, 8)] * 4,
        [(0, 8)] * 4,
    ],
)
def test_other_shapes_raise(shapes):
    with pytest.raises(ValueError, match="negative_cosine: p1, p2, z1, z2 must be four tensors"):
        negative_cosine(*(torch.ones(shape) for shape in shapes))


def test_every_kernel_has_a_reference_of_its_signature():
    assert "negative_cosine" in kernels.__all__
    for name in kernels.__all__:
        ours, plain = getattr(kernels, name), getattr(reference, f"{name}_ref")
        assert inspect.signature(ours) == inspect.signature(plain)
