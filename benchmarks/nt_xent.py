"""NT-Xent alone, forward and backward: the op beside lightly's loss and the matrix of similarities in plain torch.

`peak MiB` of a CPU are bytes of tensors alive at a time within a call, as torch's allocator reports them to
torch.profiler, inputs not counted.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.timing import allocated_at_peak, count_launches, interleave, peak_memory
from fastsiam.kernels import nt_xent
from fastsiam.kernels.reference import nt_xent_ref

TEMPERATURE = 0.1
REPEATS = {"cuda": 100, "cpu": 10}
WARMUP = {"cuda": 5, "cpu": 1}
# Largest relative difference from float64 that rounding explains, of value and gradient.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """Problem: two views of N images, rows of `dim` values in fp32."""

    batch: int
    dim: int = 128
    goals: tuple[tuple[str, float], ...] = ()
    """What is asked of ours as a share of lightly's: the number of the line, and its limit."""

    @property
    def params(self) -> dict:
        return {"batch": self.batch, "dim": self.dim}


CASES = (
    Case(4096, goals=(("memory_of_lightly", 1 / 8), ("time_of_lightly", 0.7))),
    Case(256, goals=(("time_of_lightly", 1.0),)),
)


def variants(device: torch.device) -> dict[str, Callable | None]:
    """Returns functions of two views [N, D] by name; None for lightly where it is not installed."""
    temperature = torch.tensor(TEMPERATURE, device=device)
    try:
        from lightly.loss import NTXentLoss

        theirs = NTXentLoss(TEMPERATURE)
    except ImportError:
        theirs = None
    return {
        "fastsiam": lambda a, b: nt_xent(torch.cat((a, b)), temperature),
        "lightly": theirs,
        "eager": lambda a, b: nt_xent_ref(torch.cat((a, b)), temperature),
    }


def draw(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Returns two views [N, D] that require a gradient and share a part, as in training."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.dim)
    shared, *own = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    return tuple((shared + x).to(dtype).requires_grad_() for x in own)


def both_ways(loss: Callable, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Returns the value and the gradients of both views."""
    value = loss(*views)
    return value, *torch.autograd.grad(value, views)


def check(name: str, loss: Callable, case: Case, device: torch.device) -> None:
    """Raises `RuntimeError` where value or gradients differ from float64's by more than rounding."""
    views = draw(case, device)
    wide = tuple(x.detach().double().requires_grad_() for x in views)
    exact = both_ways(lambda a, b: nt_xent_ref(torch.cat((a, b)), torch.tensor(TEMPERATURE, dtype=a.dtype)), wide)
    for what, a, b in zip(("value", "gradient", "gradient"), exact, both_ways(loss, views), strict=True):
        error = ((b.double() - a).norm() / a.norm()).item()
        if not error <= _TOLERANCE:
            raise RuntimeError(f"nt_xent: {name} at {case.params}: the {what} is off by {error:.2g} from float64")


def goals_in_words(case: Case, against: dict[str, float]) -> str:
    """Returns what is asked of ours beside lightly's, and whether it is met."""
    told = (
        f"{key.partition('_')[0]} at most {limit:g}x: {'met' if against[key] <= limit else 'missed'}"
        for key, limit in case.goals
    )
    return ", ".join(told)


def measure(results: Results, case: Case, device: torch.device, seconds: float) -> None:
    """Times every variant of one case in turns and writes their lines; ratios are to lightly's of the same turns."""
    losses = variants(device)
    views, small = draw(case, device), Case(min(case.batch, 256), case.dim)
    bound = {}
    for name, loss in losses.items():
        if loss is not None:
            check(name, loss, small, device)
            bound[name] = functools.partial(both_ways, loss, views)
    calls = {name: lambda index, once=once: once() for name, once in bound.items()}
    kind = device.type
    taken = interleave(calls, device=device, warmup=WARMUP[kind], repeats=REPEATS[kind], seconds=seconds)
    peaks = {
        name: peak_memory(once, device) if kind == "cuda" else allocated_at_peak(once, device)
        for name, once in bound.items()
    }
    for name in losses:
        if name not in bound:
            results.add("nt_xent", name, case.params, None, absent="lightly is not installed")
            continue
        against = {}
        if "lightly" in bound:
            against["time_of_lightly"] = taken[name].median / taken["lightly"].median
            against["memory_of_lightly"] = peaks[name] / peaks["lightly"]
            if name == "fastsiam" and case.goals:
                against["goals"] = goals_in_words(case, against)
        launches = count_launches(bound[name], device)
        results.add(
            "nt_xent", name, case.params, taken[name], peak_memory_bytes=peaks[name], launches=launches, **against
        )


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Measures both batches, the larger one for most of the time."""
    for case, share in zip(CASES, (0.9, 0.1), strict=True):
        measure(results, case, device, minutes * 60 * share)


if __name__ == "__main__":
    sys.exit(command(run, "nt_xent", "Time NT-Xent, forward and backward.", minutes=3.0))
