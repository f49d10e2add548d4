"""The losses in plain torch, against the distance of Algorithm 1 of the paper as loops over rows and views in fp64."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fastsiam import kernels
from fastsiam.kernels import negative_cosine, negative_cosine_all_pairs, reference
from tests.support.numerics import assert_as_exact_as_plain, gradients, loop_distance


def eq_2(p, z, **options):
    """Takes the arguments of `negative_cosine_all_pairs`."""
    return negative_cosine(*p, *z, **options)


EACH_LOSS = pytest.mark.parametrize(
    ("function", "views"), [(eq_2, 2), *((negative_cosine_all_pairs, views) for views in (2, 3, 4))]
)
BOTH_WAYS = pytest.mark.parametrize("stop_gradient", [True, False])


def draw(views, count, dim, dtype=torch.float64, scale=1.0):
    """p and z [K, N, d] that require gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(views, count, dim, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(2)
    ]


def mean_of_pairs(p, z, distance):
    """The mean of `distance(p[i], z[j])` over i != j; of two views L = D(p1, z2) / 2 + D(p2, z1) / 2."""
    pairs = [(i, j) for i in range(len(p)) for j in range(len(z)) if i != j]
    return sum(distance(p[i], z[j]) for i, j in pairs) / len(pairs)


def in_torch(p, z, stop_gradient=True):
    """The mean for autograd, in the precision of what it is given."""
    z = z.detach() if stop_gradient else z
    p, z = p / p.norm(dim=2, keepdim=True), z / z.norm(dim=2, keepdim=True)
    return mean_of_pairs(p, z, lambda a, b: -(a * b).sum(1).mean())


@EACH_LOSS
@BOTH_WAYS
@pytest.mark.parametrize("size", [(2, 3), (7, 16), (64, 256)])
def test_losses_and_gradients_are_those_of_algorithm_1(function, views, size, stop_gradient):
    inputs = draw(views, *size)
    loss = function(*inputs, stop_gradient=stop_gradient)
    expected = mean_of_pairs(*(x.detach().numpy() for x in inputs), loop_distance)
    assert loss.item() == pytest.approx(expected, abs=1e-14)
    ours, theirs = gradients(loss, inputs), gradients(in_torch(*inputs, stop_gradient), inputs)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-14, rtol=1e-12)
    if stop_gradient:
        assert ours[1] is None
    else:
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-14, rtol=1e-12)


@EACH_LOSS
@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_inputs_of_low_precision_accumulate_in_fp32(function, views, dtype, stop_gradient):
    """At most twice the error of Algorithm 1 in fp32, plus an ulp."""
    inputs = draw(views, 128, 512, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    plain_inputs = [x.detach().requires_grad_() for x in inputs]
    loss = function(*inputs, stop_gradient=stop_gradient)
    exact = in_torch(*exact_inputs, stop_gradient)
    plain = in_torch(*(x.float() for x in plain_inputs), stop_gradient)
    assert loss.dtype == torch.float32
    # Of random rows the loss is near zero: an ulp of the cosines that it is the mean of.
    ulp = torch.finfo(torch.float32).eps
    assert abs(loss.item() - exact.item()) <= 2 * abs(plain.item() - exact.item()) + ulp
    found = gradients(loss, inputs), gradients(exact, exact_inputs), gradients(plain, plain_inputs)
    assert_as_exact_as_plain(*found, dtype)


@EACH_LOSS
def test_rows_whose_squares_overflow_half_precision_are_fine(function, views):
    p, z = inputs = draw(views, 16, 64, torch.float16, scale=1000.0)
    assert (p.detach() ** 2).isinf().any()
    exact = in_torch(p.detach().double(), z.detach().double())
    assert function(p, z).item() == pytest.approx(exact.item(), abs=1e-6)
    assert gradients(function(p, z), inputs)[0].isfinite().all()


@EACH_LOSS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_of_zeros_count_as_orthogonal_and_give_no_nan(function, views, dtype):
    p, z = inputs = draw(views, 6, 10, dtype)
    with torch.no_grad():
        p[0, 0], p[1, 2], z[0, 2], z[1, 4] = 0, 0, 0, 0
    loss = function(p, z, stop_gradient=False)
    expected = mean_of_pairs(p, z, lambda a, b: -F.cosine_similarity(a, b, dim=1).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15 if dtype == torch.float64 else 1e-7)
    for ours, theirs in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        assert ours.isfinite().all()
        # Of a row of zeros the gradient is 1e8 long.
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (negative_cosine, [(4, 8), (4, 8), (4, 8), (4, 9)]),
        (negative_cosine, [(4, 8), (5, 8), (4, 8), (5, 8)]),
        (negative_cosine, [(4, 1), (4, 8), (4, 8), (4, 8)]),
        (negative_cosine, [(8,)] * 4),
        (negative_cosine, [(2, 4, 8)] * 4),
        (negative_cosine, [(0, 8)] * 4),
        (negative_cosine_all_pairs, [(2, 4, 8), (3, 4, 8)]),
        (negative_cosine_all_pairs, [(4, 8)] * 2),
        (negative_cosine_all_pairs, [(1, 4, 8)] * 2),
        (negative_cosine_all_pairs, [(2, 0, 8)] * 2),
    ],
)
def test_other_shapes_raise(function, shapes):
    with pytest.raises(ValueError, match=rf"{function.__name__}: p.* must be (four|two) tensors"):
        function(*(torch.ones(shape) for shape in shapes))


def test_every_kernel_has_a_reference_of_its_signature():
    assert "negative_cosine" in kernels.__all__
    for name in kernels.__all__:
        ours, plain = getattr(kernels, name), getattr(reference, f"{name}_ref")
        assert inspect.signature(ours) == inspect.signature(plain)
