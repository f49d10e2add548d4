"""Measures of collapse on z, and a guard that warns or stops.

The loss does not show it: SimSiam's collapsed runs reach -0.84 to -0.94, healthy ones -0.85 to -0.91. Nor does z of the
training batch, whose mean the affine-free batch norm keeps at zero. With running statistics a collapsed z is one
constant. A z without that batch norm (BYOL, SimCLR, MoCo, SwAV) is a narrow cone in healthy runs too, until they have
learned to spread it; benchmarks/LOG.md 2026-11-29 has their measures.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastsiam.config import Config

PROBE_IMAGES = 256
JUDGE_AFTER_EPOCHS = 2
# Running statistics with momentum 0.1 hold 1 % of their start after 44 steps, and small data has short epochs.
JUDGE_AFTER_STEPS = 100
IN_A_ROW = 2
LEAST_EFFECTIVE_RANK = 2.0


class Limits(NamedTuple):
    """Bounds of healthy measures."""

    least_std_ratio: float
    most_mean_abs_cos: float


# Three healthy seeds each of four methods reached down to 0.048 and up to 0.997 in their first 186 steps, in one
# measure alone; runs without a predictor or without Sinkhorn-Knopp stayed at 0.014 to 0.035 and 0.999.
CENTRED, NOT_CENTRED = Limits(0.15, 0.95), Limits(0.05, 0.99)


def limits_of(config: Config) -> Limits:
    """Returns the bounds for a z that a batch norm centres, or does not."""
    return CENTRED if config.method.projector.norm == "all" else NOT_CENTRED


MEASURE_EVERY_STEPS = (25, 500)
"""A measure at every epoch's end, but no closer than the first number and no rarer than the second."""


@dataclass(frozen=True)
class Measures:
    """Spread of z [N, d]."""

    std_ratio: float
    """Mean over dimensions of the std of l2-normalised z, times sqrt(d): 1 for isotropic z, 0 for a constant."""
    effective_rank: float
    """exp of the entropy of the normalised eigenvalues of the covariance of l2-normalised z (Roy, Vetterli 2007)."""
    mean_abs_cos: float
    """Mean |cosine| between z of different images: 1 for a constant direction."""

    def __str__(self):
        return (
            f"std_ratio {self.std_ratio:.2f}, effective rank {self.effective_rank:.1f}, "
            f"mean |cos| {self.mean_abs_cos:.2f}"
        )

    def fields(self) -> dict[str, float]:
        return asdict(self)


def measure(z: torch.Tensor) -> Measures:
    """The measures of z [N, d], N >= 2, in any floating dtype."""
    z = F.normalize(z.double(), dim=1)
    count, dim = z.shape
    centred = z - z.mean(0)
    spectrum = torch.linalg.svdvals(centred) ** 2
    share = spectrum / spectrum.sum().clamp_min(torch.finfo(z.dtype).tiny)
    entropy = -(share * share.clamp_min(torch.finfo(z.dtype).tiny).log()).sum()
    cosines = (z @ z.T).abs()
    return Measures(
        std_ratio=(centred.std(0).mean() * dim**0.5).item(),
        effective_rank=entropy.exp().item(),
        mean_abs_cos=((cosines.sum() - cosines.trace()) / (count * (count - 1))).item(),
    )


class CollapseGuard:
    """Judges evaluation-mode measures of a fixed probe set; remembers the last for the checkpoint."""

    def __init__(self, steps_per_epoch: int, limits: Limits = CENTRED):
        self.limits = limits
        least, most = MEASURE_EVERY_STEPS
        self.every_steps = min(max(steps_per_epoch, least), most)
        self.judge_from_step = max(JUDGE_AFTER_EPOCHS * steps_per_epoch, JUDGE_AFTER_STEPS)
        self.collapsed_in_a_row = 0

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def judge(self, step: int, measures: Measures) -> bool:
        """Returns True where the run counts as collapsed, given this and the measures before it."""
        if step < self.judge_from_step or not is_collapsed(measures, self.limits):
            self.collapsed_in_a_row = 0
            return False
        self.collapsed_in_a_row += 1
        return self.collapsed_in_a_row >= IN_A_ROW

    @property
    def first_alarm(self) -> bool:
        return self.collapsed_in_a_row == IN_A_ROW


def is_collapsed(measures: Measures, limits: Limits = CENTRED) -> bool:
    """All z point the same way (or its opposite): one constant, or one line on which std_ratio stays near 1."""
    constant = measures.std_ratio < limits.least_std_ratio
    line = measures.effective_rank < LEAST_EFFECTIVE_RANK
    return measures.mean_abs_cos > limits.most_mean_abs_cos and (constant or line)


_REMEDIES = {
    "simsiam": "keep method.stop_gradient=true and a predictor",
    "simsiam_alternating": "keep a predictor, lower method.steps",
    "simsiam_average": "lower method.momentum",
    "byol": "keep a predictor, raise method.momentum",
    "simclr": "raise method.temperature",
    "moco": "raise method.temperature, or lower method.momentum in a short run",
    # The last two are the authors' (their README, on a loss that stays at ln K).
    "swav": "keep method.sinkhorn_iterations=3, lower method.epsilon (0.03, 0.02), raise method.freeze_prototypes",
}


def advice(config: Config) -> str:
    """Returns what to try after a collapse, by the method."""
    return (
        f"{_REMEDIES[config.method.name]}, lower optimizer.base_lr, use a larger train.batch_size, or check that the "
        "images differ (python -m fastsiam.train --dry-run shows what is read); collapse.action=warn continues "
        "regardless"
    )
