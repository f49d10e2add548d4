"""SimSiam's loss alone: the fused kernel beside plain torch, the authors' code and torch.compile.

On a CPU `fastsiam.kernels.negative_cosine` is the plain torch reference, so the row `fused` exists on a GPU only. GPU
times are the device's: they exclude the host's time to enqueue many launches, which are counted instead.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._functorch import config as functorch_config

from benchmarks.harness.cli import command
from benchmarks.harness.environment import last_level_cache_bytes
from benchmarks.harness.results import Results
from benchmarks.harness.time_kernel import DTYPES, INPUT_BYTES, time_cases, time_kernel
from fastsiam.kernels import negative_cosine
from fastsiam.kernels.reference import negative_cosine_ref

MODES = ("forward", "backward", "both")
BATCHES = {"cuda": (4096, 512), "cpu": (512,)}
DIM = 2048

# Largest relative difference from float64 that rounding explains: bf16 resolves 0.004.
_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5}


@dataclass(frozen=True)
class Case:
    """Problem: N rows of DIM values in a dtype, and the part of the work that is timed."""

    batch: int
    dtype: str
    mode: str

    @property
    def params(self) -> dict:
        return {"batch": self.batch, "dim": DIM, "dtype": self.dtype, "mode": self.mode}


def authors_loss(p1, p2, z1, z2):
    """Computes eq. 2 of the paper with torch's module in the inputs' own dtype, as training scripts do."""
    similarity = nn.CosineSimilarity(dim=1)
    return -(similarity(p1, z2.detach()).mean() + similarity(p2, z1.detach()).mean()) * 0.5


def variants(device: torch.device) -> dict[str, Callable]:
    """Returns functions of (p1, p2, z1, z2) by name; `compile` is compiled anew for every case."""
    # The backward is timed over a kept graph, which donated buffers forbid; all modes time the same code.
    functorch_config.donated_buffer = False
    torch.compiler.reset()
    fused = {"fused": negative_cosine} if device.type == "cuda" else {}
    compiled = torch.compile(negative_cosine_ref, fullgraph=True)
    return {**fused, "eager": negative_cosine_ref, "authors": authors_loss, "compile": compiled}


def bytes_moved(case: Case) -> int:
    """Returns the least that any implementation moves through memory: inputs read once, outputs written once.

    The forward reads p1, p2, z1, z2: 4 N d elements. The backward reads the same four again and writes the gradients
    of p1 and p2: 6 N d. Rows' norms and dot products (N scalars each) and the loss are left out: below 0.1 %. `both`
    is their sum: where the inputs stay in a cache from forward to backward, more than the copy bandwidth can result.
    """
    passes = {"forward": 4, "backward": 6, "both": 10}[case.mode]
    return passes * case.batch * DIM * DTYPES[case.dtype].itemsize


def input_sets(case: Case, device: torch.device, target_bytes: int) -> list[tuple[torch.Tensor, ...]]:
    """Returns at least 3 sets (p1, p2, z1, z2) of different numbers, more than `target_bytes` together.

    p1 and p2 require a gradient; they and z share a part, so that cosines are those of training and not near zero.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.batch, DIM), DTYPES[case.dtype]
    draw = functools.partial(torch.randn, shape, generator=generator, device=device)
    count = max(3, math.ceil(target_bytes / (4 * case.batch * DIM * dtype.itemsize)))
    sets = []
    for _ in range(count):
        shared = draw()
        p1, p2, z1, z2 = ((shared + draw()).to(dtype) for _ in range(4))
        sets.append((p1.requires_grad_(), p2.requires_grad_(), z1, z2))
    return sets


def bind(loss: Callable, mode: str, sets: list) -> Callable[[int], object]:
    """Returns the function of a call's number that is timed."""
    if mode == "forward":
        return lambda i: loss(*sets[i % len(sets)])
    if mode == "both":
        return lambda i: torch.autograd.grad(loss(*sets[i % len(sets)]), sets[i % len(sets)][:2])
    graphs = [(loss(*inputs), inputs[:2]) for inputs in sets]
    return lambda i: torch.autograd.grad(*graphs[i % len(graphs)], retain_graph=True)


def check(name: str, loss: Callable, case: Case, inputs: tuple[torch.Tensor, ...]) -> None:
    """Raises `RuntimeError` where value or gradients differ from float64's by more than rounding."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact = negative_cosine_ref(*wide)
    value = loss(*inputs)
    expected, found = (exact, *torch.autograd.grad(exact, wide[:2])), (value, *torch.autograd.grad(value, inputs[:2]))
    for what, a, b in zip(("value", "gradient of p1", "gradient of p2"), expected, found, strict=True):
        error = ((b.double() - a).norm() / a.norm()).item()
        if not error <= _TOLERANCE[case.dtype]:
            raise RuntimeError(f"loss: {name} at {case.params}: the {what} is off by {error:.2g}, relative to float64")


def measure(results: Results, case: Case, device: torch.device, seconds: float, bandwidth: float) -> None:
    """Times every variant of one case in turns and writes their lines."""
    target = max(INPUT_BYTES, 3 * last_level_cache_bytes(device)) if device.type == "cuda" else 1
    sets = input_sets(case, device, target)
    bound = {}
    for name, loss in variants(device).items():
        check(name, loss, case, sets[0])
        bound[name] = bind(loss, case.mode, sets)
    time_kernel(
        results,
        "loss",
        case.params,
        bound,
        device,
        bytes_moved=bytes_moved(case),
        bandwidth=bandwidth,
        seconds=seconds,
    )


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Measures every batch, dtype and mode for about `minutes`, compilation included."""
    cases = [Case(n, dtype, mode) for n in BATCHES[device.type] for dtype in DTYPES for mode in MODES]
    time_cases(measure, results, cases, device, minutes)


if __name__ == "__main__":
    sys.exit(command(run, "loss", "Time SimSiam's loss.", minutes=1.0))
