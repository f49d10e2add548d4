"""Measures of the spectrum against loops over their definitions, and against closed forms."""

import math

import numpy as np
import pytest
import torch

from fastsiam.evaluate import spectrum


def drawn(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loops(features, pairs):
    """The definitions in numpy, one pair and one eigenvalue at a time."""
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.svd(x, compute_uv=False)
    p = values / values.sum() + 1e-7
    centred = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    q = centred[centred > 1e-14] / centred.sum()
    distances = [np.sum((x[i] - x[j]) ** 2) for i in range(len(x)) for j in range(len(x)) if i != j]
    one, two = (views.double().numpy() for views in pairs)
    apart = [np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2) for a, b in zip(one, two, strict=True)]
    first, last = spectrum.fit_range(torch.from_numpy(centred))
    ranks = np.log(np.arange(first, last + 1))
    return {
        "rankme": math.exp(-sum(p * np.log(p))),
        "effective_rank": math.exp(-sum(q * np.log(q))),
        "alpha": -np.polyfit(ranks, np.log(centred[first - 1 : last]), 1)[0],
        "alpha_ranks": (first, last),
        "uniformity": math.log(np.mean(np.exp(-2 * np.array(distances)))),
        "alignment": np.mean(apart),
    }


@pytest.mark.parametrize("shape", [(60, 24), (40, 90)])
def test_measures_are_their_definitions(shape):
    features = drawn(*shape) * torch.linspace(0.1, 3, shape[1])
    pairs = drawn(9, 5, 1), drawn(9, 5, 2)
    found, expected = spectrum.measure(features, pairs).fields(), loops(features, pairs)
    assert found.pop("alpha_ranks") == expected.pop("alpha_ranks")
    assert found == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_measured_in_double():
    features = drawn(300, 16)
    half, whole = spectrum.measure(features.half()), spectrum.measure(features.half().double())
    assert half == whole


def test_isotropic_features_use_every_direction():
    found = spectrum.measure(drawn(4000, 24))
    assert found.rankme == pytest.approx(24, rel=3e-3)
    assert found.effective_rank == pytest.approx(24, rel=5e-3)
    # For d dimensions exp(-2 |x - y|^2) = exp(4 cos - 4), and cos is about normal with variance 1 / d.
    assert found.uniformity == pytest.approx(-4 + 16 / 2 / 24, abs=0.03)
    assert abs(found.alpha) < 0.1


@pytest.mark.parametrize("power", [0.5, 1.0, 2.3])
def test_a_power_law_has_its_exponent(power):
    values = torch.arange(1, 301, dtype=torch.float64) ** -power
    orthogonal = torch.linalg.qr(drawn(500, 300).double())[0]
    found = spectrum.eigenvalues(orthogonal * values.sqrt())
    assert found.numpy() == pytest.approx(values.numpy())
    assert spectrum.fit_range(found) == spectrum.ALPHA_RANKS
    assert spectrum.alpha(found) == pytest.approx(power)


def test_one_direction_has_rank_one_and_no_slope():
    line = drawn(50, 1).sign() * torch.ones(8)
    found = spectrum.measure(line)
    assert (found.rankme, found.effective_rank) == pytest.approx((1, 1), abs=1e-4)
    assert found.alpha is None
    assert found.alpha_ranks is None
    constant = spectrum.measure(torch.ones(50, 8))
    assert constant.uniformity == pytest.approx(0)
    assert constant.rankme == pytest.approx(1, abs=1e-4)


def test_alignment_is_between_none_and_opposite():
    views = drawn(20, 6)
    assert spectrum.alignment(views, 3 * views) == pytest.approx(0)
    assert spectrum.alignment(views, -views) == pytest.approx(4)


def test_too_few_and_diverged_features_are_errors():
    with pytest.raises(ValueError, match="at least 2"):
        spectrum.measure(drawn(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        spectrum.measure(torch.full((4, 4), torch.inf))
