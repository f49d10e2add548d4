"""InfoNCE against loops over its formula in fp64: in blocks of plain torch, and as Triton kernels."""

import math
import sys

import pytest
import torch

from fastsiam.kernels import info_nce, info_nce_queue, nt_xent, nt_xent_chunked, nt_xent_triton, reference
from tests.support.numerics import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Not an import: the package has a function of the module's name.
ops = sys.modules[nt_xent.__module__]
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
T = torch.tensor(0.1)


def draw(count, dim, dtype=torch.float32, seed=0):
    """Rows of several lengths that share a part, so that similarities are spread."""
    generator = torch.Generator().manual_seed(seed)
    shared, rows = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (1, count))
    lengths = 0.1 + 5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return (lengths * (rows + 0.5 * shared)).to(DEVICE, dtype).requires_grad_()


def by_loops(queries, keys, positives, temperature, selves=None):
    """The formula, term by term, in the precision of what it is given."""
    losses = []
    for i, query in enumerate(queries):
        terms = [torch.exp(query @ key / (query.norm() * key.norm()) / temperature) for key in keys]
        denominator = sum(term for j, term in enumerate(terms) if selves is None or j != selves[i])
        losses.append(-torch.log(terms[positives[i]] / denominator))
    return sum(losses) / len(losses)


def partners(count):
    return [(i + count // 2) % count for i in range(count)]


def indices(values):
    return torch.tensor(values, device=DEVICE)


def assert_equal(loss, inputs, exact, exact_inputs, value=1e-6, slope=1e-5):
    assert loss.item() == pytest.approx(exact.item(), rel=value)
    for ours, truth in zip(gradients(loss, inputs), gradients(exact, exact_inputs), strict=True):
        assert (ours.double() - truth).norm() <= slope * truth.norm()


@pytest.fixture(params=["torch", "triton"])
def on(request, monkeypatch):
    """Each implementation in turn: in small blocks, so that several of them and ragged ones take part."""
    kernel = nt_xent_triton if request.param == "triton" else nt_xent_chunked
    monkeypatch.setattr(ops, "_implementation", lambda z: kernel)
    monkeypatch.setattr(nt_xent_chunked, "BLOCK_ROWS", 5)
    monkeypatch.setattr(nt_xent_chunked, "BLOCK_COLUMNS", 7)
    for name in ("ROWS", "COLUMNS", "SLICE"):
        monkeypatch.setattr(nt_xent_triton, name, 16)
    monkeypatch.setattr(nt_xent_triton, "PROGRAMS", 5)
    return kernel


@pytest.mark.parametrize(("count", "dim", "temperature"), [(4, 3, 0.5), (36, 20, 0.5), (36, 20, 0.05), (36, 20, 0.02)])
def test_loss_and_gradient_are_the_formulas(on, count, dim, temperature):
    z = draw(count, dim)
    exact = z.detach().double().requires_grad_()
    loss = nt_xent(z, torch.tensor(temperature))
    expected = by_loops(exact, exact, partners(count), temperature, range(count))
    assert loss.dtype == torch.float32
    assert_equal(loss, [z], expected, [exact])


def test_rows_longer_than_a_program_holds(on, monkeypatch):
    monkeypatch.setattr(nt_xent_triton, "MOST_DEPTH", 16)
    z = draw(20, 41)
    exact = z.detach().double().requires_grad_()
    assert_equal(nt_xent(z, T), [z], reference.nt_xent_ref(exact, T), [exact])


def test_three_views_have_two_positives_each(on):
    z = draw(12, 6)
    exact = z.detach().double().requires_grad_()
    places = [[(i + shift) % 12 for i in range(12)] for shift in (4, 8)]
    expected = sum(by_loops(exact, exact, place, 0.1, range(12)) for place in places) / 2
    assert_equal(nt_xent(z, T, num_views=3), [z], expected, [exact])


@pytest.mark.parametrize("with_selves", [True, False])
def test_queries_against_other_keys(on, with_selves):
    queries, keys = draw(9, 10, seed=1), draw(23, 10, seed=2)
    positives = [(5 * i + 2) % 23 for i in range(9)]
    selves = [(3 * i + 1) % 23 if with_selves else -1 for i in range(9)]
    exact = [x.detach().double().requires_grad_() for x in (queries, keys)]
    expected = by_loops(*exact, positives, 0.1, selves)
    loss = info_nce(queries, keys, indices(positives), T, selves=indices(selves) if with_selves else None)
    assert_equal(loss, [queries, keys], expected, exact)


def test_several_positives_of_a_query(on):
    """The mean over them, as of SimCLR's V > 2 views on several ranks."""
    queries, keys = draw(9, 10, seed=1), draw(23, 10, seed=2)
    columns = [[(5 * i + shift) % 23 for i in range(9)] for shift in (2, 3, 9)]
    selves = [(3 * i + 1) % 23 for i in range(9)]
    positives = torch.stack([indices(column) for column in columns], 1)
    exact = [x.detach().double().requires_grad_() for x in (queries, keys)]
    expected = sum(by_loops(*exact, column, 0.1, selves) for column in columns) / 3
    loss = info_nce(queries, keys, positives, T, selves=indices(selves))
    assert_equal(loss, [queries, keys], expected, exact)
    ref = reference.info_nce_ref(*exact, positives, T.double(), selves=indices(selves))
    assert ref.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_queries_keys_and_queue_give_what_fp32_gives(on, dtype):
    """Under autocast too, at temperature 0.07 and with similarities of 1."""
    temperature = torch.tensor(0.07)
    queries, keys = draw(8, 16, dtype, seed=1), draw(8, 16, dtype, seed=2)
    with torch.no_grad():
        keys[:2] = queries[:2]
    queue = torch.nn.functional.normalize(draw(12, 16, seed=3).detach(), dim=1).to(dtype)
    wide = [x.detach().float().requires_grad_() for x in (queries, keys)]
    places = torch.arange(8, device=DEVICE)
    expected = [info_nce(*wide, places, temperature), info_nce_queue(*wide, queue.float(), temperature)]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = [info_nce(queries, keys, places, temperature), info_nce_queue(queries, keys, queue, temperature)]
        for ours, exact in zip(found, expected, strict=True):
            assert torch.equal(ours, exact)
            slopes = zip(gradients(ours, [queries, keys]), gradients(exact, wide), strict=True)
            assert all(torch.equal(mine, theirs.to(dtype)) and mine.isfinite().all() for mine, theirs in slopes)


def test_several_ranks_have_the_gradient_of_one(on):
    """Each of three ranks has both views of four images; DDP averages the ranks' gradients."""
    z = draw(24, 8)
    losses = []
    for rows in torch.arange(24, device=DEVICE).chunk(3):
        losses.append(info_nce(z[rows], z, rows.roll(4), T, selves=rows))
    per_rank = z.unflatten(0, (3, 2, 4)).transpose(0, 1).flatten(0, 2)
    mean, whole = sum(losses) / 3, nt_xent(per_rank, T)
    assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(gradients(mean, [z]), gradients(whole, [z]), rtol=1e-5, atol=1e-7)


def test_a_queue_of_negatives(on):
    queries, keys = draw(6, 8, seed=1), draw(6, 8, seed=2)
    queue = torch.nn.functional.normalize(draw(19, 8, seed=3).detach(), dim=1).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (queries, keys, queue)]
    expected = 0
    for query, key in zip(*exact[:2], strict=True):
        positive = torch.exp(query @ key / (query.norm() * key.norm()) / 0.1)
        negatives = sum(torch.exp(query @ row / query.norm() / 0.1) for row in exact[2])
        expected = expected - torch.log(positive / (positive + negatives)) / 6
    assert_equal(info_nce_queue(queries, keys, queue, T), [queries, keys, queue], expected, exact)
    ref = reference.info_nce_queue_ref(*exact, T)
    assert ref.item() == pytest.approx(expected.item(), rel=1e-6)
    alone = info_nce_queue(queries, keys.detach(), queue.detach(), T)
    torch.testing.assert_close(gradients(alone, [queries]), gradients(ref, exact[:1]), check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_and_autocast_give_what_fp32_gives(on, dtype):
    z = draw(20, 16, dtype)
    wide = z.detach().float().requires_grad_()
    expected = nt_xent(wide, T)
    (slope,) = gradients(expected, [wide])
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = nt_xent(z, T)
        assert torch.equal(loss, expected)
        assert torch.equal(gradients(loss, [z])[0], slope.to(dtype))


@pytest.mark.parametrize("temperature", [0.05, 0.005])
def test_equal_rows_and_rows_of_zeros_give_no_nan(on, temperature):
    temperature = torch.tensor(temperature)
    z = torch.ones(20, 8, device=DEVICE, requires_grad=True)
    assert nt_xent(z, temperature).item() == pytest.approx(math.log(19), rel=2e-5)
    assert gradients(nt_xent(z, temperature), [z])[0].abs().max() < 1e-5
    zeros = torch.zeros(20, 8, device=DEVICE, requires_grad=True)
    assert nt_xent(zeros, temperature).item() == pytest.approx(math.log(19), rel=1e-6)
    # Each row's own view at cosine 1, all other rows opposite: the loss is 0 and its terms exp(-2 / T).
    ends = torch.cat((torch.ones(1, 8), -torch.ones(1, 8))).repeat(2, 1).to(DEVICE).requires_grad_()
    loss = nt_xent(ends, temperature)
    assert abs(loss.item()) < 1e-4
    assert gradients(loss, [ends])[0].isfinite().all()


@pytest.mark.parametrize("on", ["torch"], indirect=True)
def test_in_fp64_it_is_the_reference(on):
    """The kernel is of fp32."""
    z = draw(31, 12, torch.float64)[:30].detach().requires_grad_()
    rows = torch.arange(30, device=DEVICE)
    for ours in (nt_xent(z, T), info_nce(z, z, rows.roll(15), T, selves=rows)):
        assert_equal(ours, [z], reference.nt_xent_ref(z, T), [z], 1e-13, 1e-13)


def test_compiled_it_is_one_graph_in_fp32_for_all_temperatures(on):
    """Under autocast too, where a compiled backward would multiply in bf16."""
    torch._dynamo.reset()
    compiled = torch.compile(nt_xent, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    z = draw(20, 16)
    for temperature in (0.05, 0.1):
        with torch.autocast(DEVICE, torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=temperature > 0.05):
            loss = compiled(z, torch.tensor(temperature))
        expected = nt_xent(z, torch.tensor(temperature))
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
        torch.testing.assert_close(gradients(loss, [z]), gradients(expected, [z]), atol=1e-8, rtol=1e-5)


def test_opcheck(on):
    z, keys = torch.nn.functional.normalize(draw(9, 5), dim=1), torch.nn.functional.normalize(draw(13, 5), dim=1)
    own, grad = torch.arange(9, device=DEVICE), torch.ones(9, device=DEVICE)
    temperature = T.to(DEVICE)
    lse, between = ops.nt_xent_lse(z, temperature).detach(), ops.info_nce_lse(z, keys, temperature, own).detach()
    rows = z.detach(), keys.detach()
    calls = [
        (ops.nt_xent_lse, (z, temperature)),
        (ops.nt_xent_lse_backward, (grad, rows[0], temperature, lse)),
        (ops.info_nce_lse, (z, keys, temperature, own)),
        (ops.info_nce_lse, (z, keys.detach(), temperature, None)),
        (ops.info_nce_lse_backward, (grad, *rows, temperature, own, between, True, True)),
        (ops.info_nce_lse_backward, (grad, *rows, temperature, own, between, True, False)),
    ]
    for op, arguments in calls:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: nt_xent(z[:3], T), r"nt_xent: z must be \[V\*N, D\] with V = 2 above 1, got \(3, 5\)"),
        (lambda z: nt_xent(z, 0.1), "nt_xent: temperature must be a tensor of one value"),
        (lambda z: info_nce(z, z[:, :4], None, T), r"info_nce: queries must be \[n, D\] and keys \[M, D\], got"),
        (lambda z: info_nce(z, z, torch.zeros(3), T), r"positives must be int64 \[n\], n = 4, got \(3,\) of torch.f"),
        (lambda z: info_nce_queue(z, z[:2], z, T), r"info_nce_queue: queries and keys must be \[n, D\]"),
    ],
)
def test_other_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 5))
