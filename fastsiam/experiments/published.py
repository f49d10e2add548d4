"""What the SimSiam paper (arXiv 2011.10566) found in each experiment, by the rows of its tables.

All numbers are top-1 in percent of linear classification on ImageNet, ResNet-50, 100 epochs of
pretraining.
"""

from dataclasses import dataclass

from fastsiam.config.published import TABLE_2

METRIC = "ImageNet linear top-1, ResNet-50, 100 epochs"


@dataclass(frozen=True)
class Result:
    """One row of the paper."""

    top1: float | None
    """None where the paper has no number."""
    ended: str = ""
    """collapsed | diverged | unstable, where the paper says so in words."""

    def __str__(self):
        return self.ended if self.top1 is None else f"{self.top1:.1f}" + (f", {self.ended}" if self.ended else "")


# Figure 2, right: five trials with 67.7 ± 0.1, chance level without.
STOP_GRADIENT = {"with": Result(67.7), "without": Result(0.1, "collapsed")}
# Table 1. Its baseline (c) has a predictor whose rate decays.
PREDICTOR = {
    "none": Result(0.1, "collapsed"),
    "fixed": Result(1.5),
    "decayed": Result(67.7),
    "constant": Result(68.1),
}
# By batch size.
BATCH_SIZE = {size: Result(top1) for size, top1 in TABLE_2.items()}
# Table 3.
BATCH_NORM = {
    "none": Result(34.6),
    "hidden": Result(67.4),
    "default": Result(68.1),
    "all": Result(None, "unstable"),
}
# Section 4.5.
SIMILARITY = {"cosine": Result(68.1), "cross_entropy": Result(63.2)}
# Section 4.6.
SYMMETRY = {"symmetric": Result(68.1), "asymmetric": Result(64.8), "asymmetric_2x": Result(67.3)}
# Appendix B, by d.
OUTPUT_DIMENSION = {256: Result(65.3), 512: Result(67.2), 1024: Result(67.5), 2048: Result(68.1)}
# Appendix C.
SIMCLR = {"simclr": Result(66.5), "predictor": Result(66.4), "stop_gradient": Result(66.0)}
SWAV = {"swav": Result(66.5), "predictor": Result(65.2), "gradient": Result(None, "diverged")}
# Section 5.1.
ALTERNATING = {"1": Result(68.1), "10": Result(68.7), "100": Result(68.9), "epoch": Result(67.0)}
# Section 5.2.
MOVING_AVERAGE = {"average": Result(55.0), "neither": Result(0.1, "collapsed")}
