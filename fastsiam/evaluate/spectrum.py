"""Quality of features without labels: ranks and decay of their spectrum, alignment and uniformity.

All are functions of features [N, D] of any floating dtype, computed in float64.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

ALPHA_RANKS = (11, 50)
"""Ranks of the eigenvalues to which alpha is fitted, the first being 1: the range of Agrawal et al. for small data.

The upper end is cut to half the number of positive eigenvalues, below which noise of the sample bends the spectrum.
"""
# Added to p before its logarithm, as in eq. 2 of Garrido et al.
RANKME_EPSILON = 1e-7
# Rows whose distances are held at once.
_BLOCK = 1024


@dataclass(frozen=True)
class Spectrum:
    """Measures of features [N, D], of which none needs a label."""

    rankme: float
    """exp of the entropy of the singular values, not centred, of l2-normalised features (Garrido et al. 2023, eq. 2)."""
    effective_rank: float
    """exp of the entropy of the eigenvalues of the covariance of l2-normalised features (Roy, Vetterli 2007).

    Eigenvalues are squared singular values of the centred features, so that it is smaller than RankMe.
    """
    alpha: float | None
    """Eigenvalue of rank i ~ i^-alpha (Agrawal et al. 2022); None where fewer than three can be fitted."""
    uniformity: float
    """log of the mean of exp(-2 |x - y|^2) over pairs (Wang, Isola 2020, t = 2): lower is more uniform, -4 the least."""
    alignment: float | None = None
    """Mean of |x - y|^2 over two views of an image (Wang, Isola 2020, a = 2): 0 where views have equal features."""

    def fields(self) -> dict[str, float | None]:
        return asdict(self)


def measure(features: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor] | None = None) -> Spectrum:
    """Returns the measures of features [N, D], N >= 2; `pairs`: features [P, D] of two views of P images.

    Raises `ValueError` where features are not finite.
    """
    if len(features) < 2:
        raise ValueError(f"spectrum: {len(features)} features; needs at least 2")
    unit = F.normalize(features.double(), dim=1)
    if not unit.isfinite().all():
        raise ValueError("spectrum: features are not finite")
    centred = eigenvalues(unit - unit.mean(0))
    return Spectrum(
        rankme=rankme(eigenvalues(unit).sqrt()),
        effective_rank=entropy_rank(centred),
        alpha=alpha(centred),
        uniformity=uniformity(unit),
        alignment=None if pairs is None else alignment(*pairs),
    )


def eigenvalues(rows: torch.Tensor) -> torch.Tensor:
    """Returns the eigenvalues of rows^T rows [min(N, D)], largest first, in float64: squared singular values."""
    rows = rows.double()
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def rankme(singular_values: torch.Tensor) -> float:
    """Returns exp(-sum p log p), p = sigma / sum(sigma) + 1e-7: between 1 and the number of directions."""
    share = singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float64).tiny) + RANKME_EPSILON
    return (-(share * share.log()).sum()).exp().item()


def entropy_rank(values: torch.Tensor) -> float:
    """Returns exp of the entropy of eigenvalues as shares of their sum; 1 where all are zero."""
    share = values[values > 0] / values.sum()
    return (-(share * share.log()).sum()).exp().item()


def alpha(values: torch.Tensor, ranks: tuple[int, int] = ALPHA_RANKS) -> float | None:
    """Returns minus the slope of the least-squares line of log eigenvalue over log rank, within `ranks` (inclusive).

    `values`: largest first. None where fewer than three ranks are left.
    """
    positive = int((values > values[0] * 1e-10).sum())
    last = min(ranks[1], positive // 2)
    first = min(ranks[0], max(last // 4, 1))
    if last - first < 2:
        return None
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=values.device)
    x, y = rank.log(), values[first - 1 : last].log()
    x = x - x.mean()
    return -((x * (y - y.mean())).sum() / (x * x).sum()).item()


def uniformity(features: torch.Tensor, t: float = 2.0) -> float:
    """Returns log E exp(-t |x - y|^2) over all pairs of different l2-normalised features [N, D]."""
    unit = F.normalize(features.double(), dim=1)
    total = sum(
        (t * (2 * (block @ unit.T) - 2)).clamp_max(0).exp().sum().item() for block in unit.split(_BLOCK)
    )
    pairs = len(unit) * (len(unit) - 1)
    # Each is at distance 0 from itself.
    return math.log(max(total - len(unit), math.ulp(0)) / pairs)


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean of |x - y|^2 over l2-normalised features [P, D] of two views of the same images."""
    x, y = (F.normalize(views.double(), dim=1) for views in (first, second))
    return (x - y).square().sum(1).mean().item()
