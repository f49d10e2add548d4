"""The fused loss, under Triton's interpreter or on a GPU, against fp64; the same launcher either way."""

import pytest
import torch

from fastsiam.kernels import cosine_triton, reference
from tests.support.numerics import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with NumPy, which warns of what NaN and infinity give.
pytestmark = [pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One row; odd lengths; more than a program's rows; the paper's d; one element more than a program holds of a row.
SIZES = [(1, 3), (7, 100), (35, 129), (3, 2048), (2, 4097)]


def draw(count, dim, dtype=torch.float32, seed=0, scale=1.0, copies=4):
    """Rows that share a part, so that the loss is far from 0 and an ulp of it means something."""
    generator = torch.Generator().manual_seed(seed)
    shared, *parts = (torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(copies + 1))
    tensors = [scale * (shared + part) for part in parts]
    return [x.to(DEVICE, dtype).requires_grad_() for x in tensors]


def fused(p1, p2, z1, z2, stop_gradient=False):
    return cosine_triton.fused([p1, p2], [z2.unsqueeze(0), z1.unsqueeze(0)], stop_gradient)


def plain(p1, p2, z1, z2, stop_gradient=False):
    return reference.negative_cosine_ref(p1, p2, z1, z2, stop_gradient=stop_gradient)


def assert_no_worse_than_twice_plain(inputs, function, plain_function, grad=1.0):
    """Values and gradients within twice the error of plain torch in fp32 plus one ulp of the result."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for arguments, f in ((inputs, function), (inputs, plain_function), (exact_inputs, plain_function)):
        loss = f(*arguments)
        results.append((loss.detach(), *gradients(grad * loss, arguments)))
    for ours, theirs, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            ulp = torch.finfo(ours.dtype).eps * exact.abs().amax(-1)
            error, allowed = (ours - exact).abs().amax(-1), 2 * (theirs - exact).abs().amax(-1) + ulp
            assert ours.dtype == theirs.dtype
            assert (error <= allowed).all(), (error.max(), allowed.max())


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_loss_and_gradients_are_the_references(size, dtype, stop_gradient):
    assert_no_worse_than_twice_plain(
        draw(*size, dtype), lambda *x: fused(*x, stop_gradient), lambda *x: plain(*x, stop_gradient)
    )


def test_in_fp64_it_is_the_reference():
    inputs = draw(9, 33, torch.float64)
    ours, theirs = fused(*inputs), plain(*inputs)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-15)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-16, rtol=1e-13)


def test_predictions_and_projections_may_differ_in_dtype():
    p1, p2, _, _ = draw(5, 40, torch.bfloat16)
    _, _, z1, z2 = draw(5, 40, torch.float32)
    assert_no_worse_than_twice_plain([p1, p2, z1, z2], fused, plain)


def test_rows_may_be_strided():
    """Chunks of one buffer, every second row, columns out of a wider tensor, a transposed tensor."""
    whole = draw(12, 24, copies=1)[0].detach()
    views = [whole[:4, :10], whole[4:12:2, 3:13], whole.t()[:4, :10], whole[1:5, ::2][:, :10]]
    inputs = [x.requires_grad_() for x in views]
    assert_no_worse_than_twice_plain(inputs, fused, plain)
    assert all(gradient.is_contiguous() for gradient in gradients(fused(*inputs), inputs))


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_the_target_may_be_the_mean_of_several(targets):
    p, *z = draw(6, 50, torch.bfloat16, copies=1 + targets)
    z = torch.stack(z).detach().requires_grad_()
    assert_no_worse_than_twice_plain(
        [p, z],
        lambda p, z: cosine_triton.fused([p], [z], False),
        lambda p, z: reference.negative_cosine_mean_target_ref(p, z, stop_gradient=False),
    )
    one_by_one = p.detach().double(), sum(z.detach().double()) / targets
    expected = -sum((a @ b) / (a.norm() * b.norm()) for a, b in zip(*one_by_one, strict=True)) / 6
    assert cosine_triton.fused([p], [z]).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_asymmetric_form_is_one_half_of_the_symmetric_one():
    p1, p2, z1, z2 = draw(8, 30)
    halves = cosine_triton.fused([p1], [z2.unsqueeze(0)]).item(), cosine_triton.fused([p2], [z1.unsqueeze(0)]).item()
    assert fused(p1, p2, z1, z2).item() == pytest.approx(sum(halves) / 2, abs=1e-7)
    assert_no_worse_than_twice_plain(
        [p1, z2],
        lambda p, z: cosine_triton.fused([p], [z.unsqueeze(0)], False),
        lambda p, z: reference.negative_cosine_asymmetric_ref(p, z, stop_gradient=False),
    )


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1e-9, 3e-9, 1e-8, 1e-4, 1e6, 1e14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_and_long_rows(scale, dtype):
    """Down to and below the norm of 1e-8 at which `F.cosine_similarity` stops dividing."""
    assert_no_worse_than_twice_plain(draw(6, 40, dtype, scale=scale), fused, plain)


@pytest.mark.parametrize("scale", [2.0**50, 1e25, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_squares_overflow_fp32_have_their_cosine_all_the_same(scale, dtype):
    inputs = draw(6, 40, dtype)
    with torch.no_grad():
        for x, factor in zip(inputs, (scale, 1.0, scale, 1e-3), strict=True):
            x *= factor
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    loss, exact = fused(*inputs), plain(*exact_inputs)
    assert loss.item() == pytest.approx(exact.item(), abs=2e-7)
    for ours, truth in zip(gradients(loss, inputs), gradients(exact, exact_inputs), strict=True):
        error = (ours - truth).abs().amax(1)
        assert (error <= 4 * torch.finfo(dtype).eps * truth.abs().amax(1)).all()


def test_rows_of_zeros_count_as_orthogonal_with_torchs_gradient():
    inputs = draw(6, 10)
    with torch.no_grad():
        inputs[0][0], inputs[1][2], inputs[2][2], inputs[3][4] = 0, 0, 0, 0
    assert_no_worse_than_twice_plain(inputs, fused, plain)
    everywhere_zero = [torch.zeros_like(x).requires_grad_() for x in inputs]
    assert fused(*everywhere_zero).item() == 0
    assert all((gradient == 0).all() for gradient in gradients(fused(*everywhere_zero), everywhere_zero))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_nan_and_infinity_reach_the_loss_and_the_gradients_of_their_row(value, place):
    inputs = draw(4, 9)
    with torch.no_grad():
        inputs[place][1, 5] = value
    loss, theirs = fused(*inputs), plain(*inputs)
    assert loss.isnan()
    assert theirs.isnan()
    for ours, other in zip(gradients(loss, inputs), gradients(theirs, inputs), strict=True):
        assert (ours.isnan().any(1) == other.isnan().any(1)).all()
        torch.testing.assert_close(ours[[0, 2, 3]], other[[0, 2, 3]])


def test_a_scaled_gradient_in_fp16_is_stored_after_the_scale():
    """A gradient is about 1e-6, as at N = 4096 and |p| = 60, of which fp16 keeps 4 bits; 65,536 times that, all 11."""
    inputs = draw(256, 16, torch.float16, scale=160.0)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    ours = gradients(65536.0 * fused(*inputs), inputs)
    exact = gradients(65536.0 * plain(*exact_inputs), exact_inputs)
    for gradient, truth in zip(ours, exact, strict=True):
        stored_first = (truth / 65536.0).to(torch.float16).double() * 65536.0
        assert (gradient - truth).norm() < 2**-11 * truth.norm()
        assert (stored_first - truth).norm() > 2**-8 * truth.norm()


def test_many_programs_sum_up_in_the_same_order_every_time(monkeypatch):
    monkeypatch.setattr(cosine_triton, "PARTIALS_BLOCK", 4)
    inputs = draw(300, 5)
    first = fused(*inputs)
    assert first.item() == pytest.approx(plain(*inputs).item(), abs=1e-7)
    assert torch.equal(first, fused(*inputs))


def test_one_launch_each_way(monkeypatch):
    launches = []

    def counting(name):
        kernel = getattr(cosine_triton, name)

        class Counting:
            def __getitem__(self, grid):
                launches.append(name)
                return kernel[grid]

        return Counting()

    for name in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(cosine_triton, name, counting(name))
    inputs = draw(8, 2048)
    gradients(fused(*inputs), inputs)
    assert launches == ["_forward_kernel", "_backward_kernel"]


def test_a_counter_that_is_kept_is_left_at_zero_and_changes_nothing():
    """8 rows are 4 programs a pair, of which the last one adds up."""
    inputs, counter = draw(8, 2048), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    p1, p2, z1, z2 = inputs
    expected = fused(*inputs)
    for _ in range(3):
        loss = cosine_triton.fused([p1, p2], [z2.unsqueeze(0), z1.unsqueeze(0)], False, counter)
        assert torch.equal(loss, expected)
        assert counter.item() == 0
    for ours, theirs in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_opcheck():
    p1, p2, z1, z2 = draw(5, 12)
    pairs = [p1, p2], [z2.unsqueeze(0), z1.unsqueeze(0)]
    for counter in ((), (torch.zeros(1, dtype=torch.int32, device=DEVICE),)):
        checks = torch.library.opcheck(cosine_triton.negative_cosine_op, (*pairs, *counter))
        assert set(checks.values()) == {"SUCCESS"}
    loss, statistics = cosine_triton.negative_cosine_op([p1], [z2.detach().unsqueeze(0)])
    arguments = (torch.ones_like(loss), [p1.detach()], [z2.detach().unsqueeze(0)], statistics.detach())
    for to_z in (False, True):
        checks = torch.library.opcheck(cosine_triton.negative_cosine_backward_op, (*arguments, to_z))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_compiled_it_is_one_graph_with_the_same_numbers(stop_gradient):
    torch._dynamo.reset()

    def halves(z, p):
        """As a method calls it: both views in one buffer, scaled by an amplified loss."""
        z1, z2 = z.chunk(2)
        p1, p2 = p.chunk(2)
        return 3 * fused(p1, p2, z1, z2, stop_gradient)

    z, p = draw(10, 20, copies=2)
    compiled = torch.compile(halves, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    ours, eager = compiled(z, p), halves(z, p)
    torch.testing.assert_close(ours, eager, atol=0, rtol=1e-6)
    assert ours.item() == pytest.approx(3 * plain(*p.chunk(2), *z.chunk(2)).item(), abs=1e-6)
    for compiled_grad, eager_grad in zip(gradients(ours, (z, p)), gradients(eager, (z, p)), strict=True):
        if stop_gradient and eager_grad is None:
            assert compiled_grad is None or not compiled_grad.any()
        else:
            torch.testing.assert_close(compiled_grad, eager_grad, atol=0, rtol=1e-6)
