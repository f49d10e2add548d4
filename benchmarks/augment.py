"""Augmenter alone: the fused kernel (numba on a CPU, Triton on CUDA) beside plain torch and torch.compile.

The public function is timed: on a CPU with its preparation of the draws, on CUDA the device's part. torch.compile gets
the same mathematics without indices that depend on the draws: every operation on all views, then a choice.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.time_kernel import DTYPES, FUSED, image_sets, on_sets, time_cases, time_kernel
from fastsiam.config.views import ViewSpec
from fastsiam.data.augment import host_draws
from fastsiam.data.rng import augment_draws
from fastsiam.kernels import augment_views, reference

# Single values may differ by steps of bf16, where rounding crosses a threshold; the mean of all may not.
_MEAN_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Case:
    """Problem: number and size of views, the share of them that is blurred, colour mode and output dtype."""

    views: int
    size: int
    color: str
    blur: float
    dtype: str

    @property
    def spec(self) -> ViewSpec:
        return ViewSpec(size=self.size, color=self.color, blur=self.blur, blur_kind="pil")


CASES = {
    "cuda": [
        *(Case(1024, 224, color, blur, "bf16") for color in ("matrix", "exact") for blur in (0.5, 0.0)),
        Case(1024, 32, "matrix", 0.0, "bf16"),
    ],
    "cpu": [
        *(Case(64, 224, color, 0.5, dtype) for color in ("matrix", "exact") for dtype in DTYPES),
        Case(64, 224, "matrix", 0.0, "bf16"),
        Case(256, 32, "matrix", 0.0, "bf16"),
    ],
}


def dense_views(crops, flip, sigma, order, factors, grayscale, solarize, *, spec: ViewSpec, dtype: torch.dtype):
    """Computes `augment_views` with the draws on the device of the crops, for torch.compile."""

    def choose(chosen, changed, x):
        return torch.where(chosen.view(-1, 1, 1, 1), changed, x)

    x = reference.to_unit(crops)
    x = choose(flip, x.flip(3), x)
    if spec.blur:
        x = choose(sigma > 0, reference.blur(x, sigma.clamp(min=spec.blur_sigma[0]), spec.blur_kind), x)
    if spec.color == "matrix":
        x = reference.apply_color(x, *reference.color_matrix(x.mean((2, 3)), order, factors, grayscale)).clamp(0, 1)
    else:
        for step in range(4):
            changed = [f(x, factors[:, k]) for k, f in enumerate(reference.EXACT_JITTER)]
            for k, one in enumerate(changed):
                x = choose(order[:, step] == k, one, x)
        x = choose(grayscale, reference.luma(x).expand_as(x), x)
    if spec.solarize:
        x = choose(solarize, torch.where(x >= 0.5, 1 - x, x), x)
    return reference.normalize(x, spec.mean, spec.std, dtype)


def variants(case: Case, device: torch.device, drawn: dict) -> dict[str, Callable]:
    """Returns functions of the crops by name."""
    spec, dtype = case.spec, DTYPES[case.dtype]
    options = {"color": spec.color, "blur_kind": spec.blur_kind, "mean": spec.mean, "std": spec.std, "dtype": dtype}
    torch.compiler.reset()
    # The reference keeps its constants on the device in a cache, which a compiled graph does by itself.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    compiled = torch.compile(functools.partial(dense_views, spec=spec, dtype=dtype), fullgraph=True)
    names = ("flip", "sigma", "order", "factors", "grayscale", "solarize")
    return {
        FUSED[device.type]: lambda crops: augment_views(crops, **drawn, **options),
        "eager": lambda crops: reference.augment_views_ref(crops, **drawn, **options),
        "compile": lambda crops: compiled(crops, *(drawn[name].to(device) for name in names)),
    }


def bytes_moved(case: Case) -> int:
    """Returns the least to move: each crop read once, each view written once. Contrast needs a second read."""
    return case.views * case.size**2 * 3 * (1 + DTYPES[case.dtype].itemsize)


def measure(results: Results, case: Case, device: torch.device, seconds: float, bandwidth: float) -> None:
    """Times every variant of one case in turns and writes their lines."""
    drawn = host_draws(augment_draws(case.spec, 0, 0, np.arange(case.views), 0))
    sets = image_sets((case.views, case.size, case.size, 3), device)
    functions = variants(case, device, drawn)
    expected = functions["eager"](sets[0]).float()
    for name, function in functions.items():
        off = (function(sets[0]).float() - expected).abs().mean().item()
        if not off <= _MEAN_TOLERANCE:
            raise RuntimeError(f"augment: {name} at {case} is off by {off:.2g} on average from eager")
    time_kernel(
        results,
        "augment",
        vars(case),
        {name: on_sets(function, sets) for name, function in functions.items()},
        device,
        bytes_moved=bytes_moved(case),
        bandwidth=bandwidth,
        seconds=seconds,
        each=("view", case.views),
    )


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Measures every case of the device for about `minutes`, compilation included."""
    time_cases(measure, results, CASES[device.type], device, minutes)


if __name__ == "__main__":
    sys.exit(command(run, "augment", "Time the augmenter.", minutes=2.0))
