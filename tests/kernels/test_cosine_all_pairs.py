"""The loss of K views: the mean over all ordered pairs, against a double loop over them."""

import pytest
import torch
import torch.nn.functional as F

from fastsiam.kernels import negative_cosine_all_pairs
from tests.support.numerics import assert_as_exact_as_plain, gradients, loop_distance

VIEWS = (2, 3, 4)
SIZES = [(2, 3), (7, 16), (32, 64)]


def two(views, count, dim, dtype=torch.float64, seed=0, scale=1.0):
    """p and z [K, N, d] that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(views, count, dim, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(2)
    ]


def double_loop(p, z, distance):
    """The mean of `distance(p[i], z[j])` over i != j."""
    pairs = [(i, j) for i in range(len(p)) for j in range(len(z)) if i != j]
    return sum(distance(p[i], z[j]) for i, j in pairs) / len(pairs)


def in_torch(p, z, stop_gradient=True):
    """The double loop for autograd, in the precision of what it is given."""
    z = z.detach() if stop_gradient else z
    return double_loop(
        p, z, lambda a, b: -((a / a.norm(dim=1, keepdim=True)) * (b / b.norm(dim=1, keepdim=True))).sum(1).mean()
    )


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("size", SIZES)
def test_loss_is_the_mean_of_algorithm_1s_distance_over_all_ordered_pairs(views, size):
    p, z = two(views, *size)
    expected = double_loop(p.detach().numpy(), z.detach().numpy(), loop_distance)
    assert negative_cosine_all_pairs(p, z).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_are_those_of_the_double_loop(views, stop_gradient):
    inputs = two(views, 7, 16)
    ours = gradients(negative_cosine_all_pairs(*inputs, stop_gradient=stop_gradient), inputs)
    theirs = gradients(in_torch(*inputs, stop_gradient), inputs)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-15, rtol=1e-12)
    if stop_gradient:
        assert ours[1] is theirs[1] is None
    else:
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_inputs_of_low_precision_accumulate_in_fp32(dtype, stop_gradient):
    """At most twice the error of the double loop in fp32, plus an ulp."""
    inputs = two(4, 64, 256, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    plain_inputs = [x.detach().requires_grad_() for x in inputs]
    loss = negative_cosine_all_pairs(*inputs, stop_gradient=stop_gradient)
    exact = in_torch(*exact_inputs, stop_gradient)
    plain = in_torch(*(x.float() for x in plain_inputs), stop_gradient)
    assert loss.dtype == torch.float32
    # Of random rows the loss is near zero: an ulp of the cosines that it is the mean of.
    ulp = torch.finfo(torch.float32).eps
    assert abs(loss.item() - exact.item()) <= 2 * abs(plain.item() - exact.item()) + ulp
    found = gradients(loss, inputs), gradients(exact, exact_inputs), gradients(plain, plain_inputs)
    assert_as_exact_as_plain(*found, dtype)


def test_rows_whose_squares_overflow_half_precision_are_fine():
    p, z = two(3, 16, 64, torch.float16, scale=1000.0)
    assert (p.detach() ** 2).isinf().any()
    exact = in_torch(p.detach().double(), z.detach().double())
    assert negative_cosine_all_pairs(p, z).item() == pytest.approx(exact.item(), abs=1e-6)


def test_rows_of_zeros_count_as_orthogonal_and_give_no_nan():
    p, z = inputs = two(3, 6, 10)
    with torch.no_grad():
        p[0, 0], z[1, 2], p[2, 4], z[2, 4] = 0, 0, 0, 0
    loss = negative_cosine_all_pairs(p, z, stop_gradient=False)
    expected = double_loop(p, z, lambda a, b: -F.cosine_similarity(a, b, dim=1).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15)
    for ours, theirs in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=1e-6)


@pytest.mark.parametrize("shapes", [[(2, 4, 8), (3, 4, 8)], [(4, 8), (4, 8)], [(1, 4, 8)] * 2, [(2, 0, 8)] * 2])
def test_other_shapes_raise(shapes):
    with pytest.raises(
        ValueError, match=r"negative_cosine_all_pairs: p and z must be two tensors \[K, N, d\] with K > 1"
    ):
        negative_cosine_all_pairs(*(torch.ones(shape) for shape in shapes))
