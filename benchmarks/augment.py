"""The augmenter alone: the fused kernel (numba on a CPU, Triton on CUDA) beside plain torch and torch.compile.

What is timed is the public function: on a CPU with its preparation of the draws, on CUDA the device's part.
torch.compile gets the same mathematics without indices that depend on the draws: every operation on all views, then
a choice.
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
from benchmarks.harness.time_kernel import time_kernel
from benchmarks.harness.timing import copy_bandwidth
from fastsiam.config.views import ViewSpec
from fastsiam.data.augment import host_draws
from fastsiam.data.rng import augment_draws
from fastsiam.kernels import augment_views, reference

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FUSED = {"cpu": "numba", "cuda": "triton"}
_CALLS = {"cuda": 3, "cpu": 1}
_REPEATS = {"cuda": 50, "cpu": 15}
# Views may differ where rounding moves a value over a threshold, by bf16's steps; their mean may not.
_MEAN_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Case:
    """One problem: so many views of a size, the share of them that is blurred, colour mode and output dtype."""

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
    """`augment_views` with the draws on the device of the crops, for torch.compile."""

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
    """Functions of the crops by name."""
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
    """The least there is to move: each crop read once, each view written once. Contrast needs a second read."""
    return case.views * case.size**2 * 3 * (1 + DTYPES[case.dtype].itemsize)


def measure(results: Results, case: Case, device: torch.device, seconds: float, bandwidth: float) -> None:
    """Time every variant of one case in turns and write their lines."""
    drawn = host_draws(augment_draws(case.spec, 0, 0, np.arange(case.views), 0))
    shape = (case.views, case.size, case.size, 3)
    count = max(2, 200_000_000 // (case.views * case.size**2 * 3)) if device.type == "cuda" else 2
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(count)]
    functions = variants(case, device, drawn)
    expected = functions["eager"](sets[0]).float()
    for name, function in functions.items():
        off = (function(sets[0]).float() - expected).abs().mean().item()
        if not off <= _MEAN_TOLERANCE:
            raise RuntimeError(f"augment: {name} at {case} is off by {off:.2g} on average from eager")
    bound = {name: lambda i, f=f: f(sets[i % len(sets)]) for name, f in functions.items()}
    time_kernel(
        results,
        "augment",
        vars(case),
        bound,
        device,
        bytes_moved=bytes_moved(case),
        bandwidth=bandwidth,
        seconds=seconds,
        repeats=_REPEATS[device.type],
        calls=_CALLS[device.type],
        each=("view", case.views),
    )


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Every case of the device; about `minutes` long, compilation included."""
    bandwidth = copy_bandwidth(device)
    for case in CASES[device.type]:
        measure(results, case, device, minutes * 60 / len(CASES[device.type]), bandwidth)


if __name__ == "__main__":
    sys.exit(command(run, "augment", "Time the augmenter.", minutes=2.0))
