"""Quality of features without labels: ranks and decay of their spectrum, alignment and uniformity.

All are functions of features [N, D] of any floating dtype, computed in float64.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

ALPHA_RANKS = (11, 50)
"""Ranks of the eigenvalues to which alpha is fitted, the first being 1; see `fit_range`."""
# Added to p before its logarithm, as in eq. 2 of Garrido et al.
RANKME_EPSILON = 1e-7
# Rows whose distances are held at once.
_BLOCK = 1024


@dataclass(frozen=True)
class Spectrum:
    """Measures of features [N, D], of which none needs a label."""

    rankme: float
    """exp of the entropy of singular values of l2-normalised features, not centred (Garrido et al. 2023, eq. 2)."""
    effective_rank: float
    """exp of the entropy of the eigenvalues of the covariance of l2-normalised features (Roy, Vetterli 2007).

    Eigenvalues are squared singular values of the centred features, so that it is smaller than RankMe.
    """
    alpha: float | None
    """Eigenvalues of that covariance fall as rank^-alpha (Agrawal et al. 2022); None without a range to fit."""
    alpha_ranks: tuple[int, int] | None
    """The first and last rank that alpha is fitted to."""
    uniformity: float
    """log of the mean of exp(-2 |x - y|^2) over pairs (Wang, Isola 2020, t = 2): about -4 is the most uniform."""
    alignment: float | None = None
    """Mean of |x - y|^2 over two views of an image (Wang, Isola 2020, a = 2): 0 where views have equal features."""

    def __str__(self):
        decay = "none" if self.alpha is None else f"{self.alpha:.2f}"
        return (
            f"RankMe {self.rankme:.1f}, effective rank {self.effective_rank:.1f}, alpha {decay}, "
            f"uniformity {self.uniformity:.2f}"
        )

    def fields(self) -> dict[str, float | tuple[int, int] | None]:
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
        alpha_ranks=fit_range(centred),
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
    share = values[values > 0] / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return (-(share * share.log()).sum()).exp().item()


def fit_range(values: torch.Tensor, ranks: tuple[int, int] = ALPHA_RANKS) -> tuple[int, int] | None:
    """Returns the first and last rank that alpha is fitted to; None where fewer than three are left.

    The last is cut to half the number of positive eigenvalues, for the noise of a sample bends the end of its spectrum;
    the first then to a quarter of the last. Stringer et al. (2019) leave out the first ten as well.
    """
    positive = int((values > values[0] * 1e-10).sum())
    last = min(ranks[1], positive // 2)
    first = min(ranks[0], max(last // 4, 1))
    return (first, last) if last - first >= 2 else None


def alpha(values: torch.Tensor, ranks: tuple[int, int] = ALPHA_RANKS) -> float | None:
    """Returns minus the slope of the least-squares line of log eigenvalue over log rank, within `fit_range`.

    `values`: largest first. None without a range.
    """
    found = fit_range(values, ranks)
    if found is None:
        return None
    first, last = found
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=values.device)
    x, y = rank.log(), values[first - 1 : last].log()
    x = x - x.mean()
    return -((x * (y - y.mean())).sum() / (x * x).sum()).item()


def uniformity(features: torch.Tensor, t: float = 2.0) -> float:
    """Returns log E exp(-t |x - y|^2) over all pairs of different l2-normalised features [N, D]."""
    unit = F.normalize(features.double(), dim=1)
    total = sum((t * (2 * (block @ unit.T) - 2)).clamp_max(0).exp().sum().item() for block in unit.split(_BLOCK))
    pairs = len(unit) * (len(unit) - 1)
    # Each is at distance 0 from itself.
    return math.log(max(total - len(unit), math.ulp(0)) / pairs)


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the mean of |x - y|^2 over l2-normalised features [P, D] of two views of the same images."""
    x, y = (F.normalize(views.double(), dim=1) for views in (first, second))
    return (x - y).square().sum(1).mean().item()
