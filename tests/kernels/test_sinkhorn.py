"""Codes of Sinkhorn-Knopp against the loop of divisions in fp64, on one rank and on two."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from fastsiam.kernels import sinkhorn
from fastsiam.kernels.reference import sinkhorn_ref

EPSILON = torch.tensor(0.05)


def draw(count=12, prototypes=7, dtype=torch.float32, scale=1.0):
    scores = torch.rand(count, prototypes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (scale * (2 * scores - 1)).to(dtype)


def by_loops(scores, epsilon, iterations=3):
    """Divides each column by its sum, then each row, number by number in fp64."""
    count, prototypes = scores.shape
    matrix = (scores.double() / epsilon).exp().tolist()
    for _ in range(iterations):
        for k in range(prototypes):
            total = sum(matrix[b][k] for b in range(count))
            for b in range(count):
                matrix[b][k] /= total * prototypes
        for b in range(count):
            total = sum(matrix[b])
            matrix[b] = [value / total for value in matrix[b]]
    return torch.tensor(matrix, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_the_loops(dtype, scale, iterations):
    """Of scores / epsilon up to 200; half precision gives what its values give in fp32, under autocast too."""
    scores = draw(dtype=dtype, scale=scale).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores, EPSILON, iterations=iterations)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, sinkhorn(scores.float(), EPSILON, iterations=iterations))
    expected = by_loops(scores.detach(), EPSILON.double().item(), iterations)
    torch.testing.assert_close(codes.double(), expected, atol=1e-7, rtol=1e-4 * max(1, scale / 2))


def test_marginals_and_the_reference():
    scores = draw(40, 8)
    codes = sinkhorn(scores, EPSILON, iterations=100)
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 40 / 8), atol=0, rtol=1e-3)
    wide = scores.double()
    torch.testing.assert_close(sinkhorn(wide, EPSILON), sinkhorn_ref(wide, EPSILON), atol=1e-14, rtol=1e-11)


@pytest.mark.parametrize("far", [(0, slice(None)), (slice(None), 2), (slice(4, 8), slice(None))], ids=str)
def test_rows_and_columns_far_below_all_others_give_no_nan(far):
    """exp(-2,000) is 0 in fp64 too; logarithms are not."""
    scores = draw()
    scores[far] -= 100
    codes = sinkhorn(scores, EPSILON)
    torch.testing.assert_close(codes.double(), sinkhorn_ref(scores.double(), EPSILON.double()), atol=1e-5, rtol=2e-3)
    torch.testing.assert_close(codes.sum(1), torch.ones(12))


WEIGHTS = torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_do_not_count_change_no_codes(dtype):
    """Whatever they hold: not even scores far above or below all others make a NaN."""
    counts, scores = WEIGHTS > 0, draw(dtype=dtype)
    alone = sinkhorn(scores[counts], EPSILON)
    for far in (0, -50, 50):
        spoilt = scores.clone()
        spoilt[~counts] += far
        codes = sinkhorn(spoilt, EPSILON, weights=WEIGHTS.to(alone.dtype))
        torch.testing.assert_close(codes[counts], alone, atol=1e-6, rtol=1e-5)
    exact = scores.double()
    expected = by_loops(exact[counts], EPSILON.double().item())
    torch.testing.assert_close(alone.double(), expected, atol=1e-6, rtol=1e-4)
    ours, ref = (f(exact, EPSILON, weights=WEIGHTS.double())[counts] for f in (sinkhorn, sinkhorn_ref))
    torch.testing.assert_close(ours, ref, atol=1e-14, rtol=1e-11)
    all_count = sinkhorn(scores, EPSILON, weights=torch.ones(12))
    torch.testing.assert_close(all_count, sinkhorn(scores, EPSILON), atol=0, rtol=0)


@pytest.mark.parametrize("weights", [None, WEIGHTS.double()], ids=["all count", "some count"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_gradients_are_those_of_the_logarithms(iterations, weights):
    """Through every division; of divisions of numbers, too."""
    scores = draw(dtype=torch.float64).requires_grad_()
    slopes = torch.rand(12, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if weights is not None:
        slopes[weights == 0] = 0
    options = {"iterations": iterations, "weights": weights}
    ours, ref = (
        torch.autograd.grad((f(scores, EPSILON.double(), **options) * slopes).sum(), scores)[0]
        for f in (sinkhorn, sinkhorn_ref)
    )
    assert ours.abs().max() > 1e-2
    torch.testing.assert_close(ours, ref, atol=1e-12, rtol=1e-9)
    matrix = (scores / EPSILON.double()).exp()
    if weights is not None:
        matrix = matrix[weights > 0]
        slopes = slopes[weights > 0]
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    plain = torch.autograd.grad((matrix * slopes).sum(), scores)[0]
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cosines_of_one_and_minus_one_give_no_nan(epsilon, dtype):
    """exp(1 / 0.05) is infinite in fp16. A queue of zeros, which does not count, beside them as well."""
    scores = torch.tensor([[1.0, -1, 0.5], [1, -1, 1], [-1, -1, -1], [-1, -0.9, -1]], dtype=dtype)
    zeros, epsilon = torch.zeros(2, 3, dtype=dtype), torch.tensor(epsilon)
    codes = sinkhorn(scores, epsilon)
    assert torch.equal(codes, sinkhorn(scores.float(), epsilon))
    torch.testing.assert_close(codes.sum(1), torch.ones(4))
    expected = sinkhorn_ref(scores.double(), epsilon.double())
    torch.testing.assert_close(codes.double(), expected, atol=1e-5, rtol=1e-3)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0])
    for rest in (zeros, zeros + 1):
        torch.testing.assert_close(sinkhorn(torch.cat([scores, rest]), epsilon, weights=weights)[:4], codes)


def of_all_ranks(x):
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    return gather(x, 0, dist.group.WORLD).view(dist.get_world_size(), *x.shape)


def codes_of_rank(compiled):
    """Unequal parts: 5 and 7 of the 12 images."""
    scores = draw()[:5] if dist.get_rank() == 0 else draw()[5:]
    function = torch.compile(sinkhorn, fullgraph=True, backend="aot_eager") if compiled else sinkhorn
    return function(scores, EPSILON, of_all_ranks=of_all_ranks)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_ranks_have_the_codes_of_one(ranks, compiled):
    codes = torch.cat(ranks(2, codes_of_rank, compiled))
    torch.testing.assert_close(codes, sinkhorn(draw(), EPSILON), atol=1e-6, rtol=1e-6)


def test_one_graph_serves_every_epsilon():
    torch._dynamo.reset()
    compiled = torch.compile(sinkhorn, fullgraph=True, backend="aot_eager")
    for epsilon in (0.05, 0.03):
        with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=epsilon < 0.05):
            codes = compiled(draw(), torch.tensor(epsilon))
        torch.testing.assert_close(codes, sinkhorn(draw(), torch.tensor(epsilon)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), EPSILON), r"sinkhorn: scores must be \[B, K\] and iterations above 0, got \(3,\) and 3"),
        ((torch.ones(3, 2), 0.05), "sinkhorn: epsilon must be a tensor of one value"),
    ],
)
def test_other_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(*arguments)
