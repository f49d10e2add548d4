"""Crops out of a resident store: the kernel (numba on a CPU, Triton on CUDA) beside plain torch and torch.compile.

Plain torch gathers the images and multiplies them by dense matrices of weights, all of fp32. What is timed is the
public function: on a CPU with its checks of the boxes, on CUDA the device's part.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.time_kernel import time_kernel
from benchmarks.harness.timing import copy_bandwidth
from fastsiam.config.views import ViewSpec
from fastsiam.data.backends.resident import boxes_in_store
from fastsiam.data.rng import crop_boxes
from fastsiam.kernels import crop_resize
from fastsiam.kernels.reference import crop_resize_ref

FUSED = {"cpu": "numba", "cuda": "triton"}
_CALLS = {"cuda": 3, "cpu": 1}
_REPEATS = {"cuda": 50, "cpu": 15}
# Two crops of an image, as a step takes them.
_VIEWS = 2
# Of a photograph of ImageNet's most frequent shape, for which the boxes are drawn.
_HEIGHT, _WIDTH = 375, 500
# Crops may differ where rounding goes the other way, by one level; not in more than this share of their pixels.
_OFF_BY_ONE = 0.01


@dataclass(frozen=True)
class Case:
    """One problem: so many crops to a size, out of half as many images stored at another."""

    crops: int
    stored: int
    size: int


CASES = {
    "cuda": [Case(1024, 160, 160), Case(1024, 256, 224), Case(1024, 32, 32)],
    "cpu": [Case(64, 160, 160), Case(64, 256, 224), Case(256, 32, 32)],
}


def draw_boxes(case: Case) -> torch.Tensor:
    """fp32 [crops, 4] in pixels of the store: random resized crops of the paper's range of areas."""
    images = case.crops // _VIEWS
    sizes = np.tile(np.array([_HEIGHT, _WIDTH], np.int32), (images, 1))
    spec = ViewSpec(size=case.size, color="matrix")
    boxes = [crop_boxes(spec, 0, 0, np.arange(images), view, sizes) for view in range(_VIEWS)]
    return torch.from_numpy(boxes_in_store(np.stack(boxes), sizes, case.stored)).view(-1, 4)


def variants(device: torch.device, size: int, boxes: torch.Tensor, indices: torch.Tensor) -> dict[str, Callable]:
    """Functions of the images by name; torch.compile gets boxes and indices on the device."""
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(crop_resize_ref, size=size), fullgraph=True)
    there = {"boxes": boxes.to(device), "indices": indices.to(device)}
    return {
        FUSED[device.type]: lambda images: crop_resize(images, boxes, size, indices),
        "eager": lambda images: crop_resize_ref(images, boxes, size, indices),
        "compile": lambda images: compiled(images, **there),
    }


def bytes_moved(case: Case, boxes: torch.Tensor) -> int:
    """The least there is to move: the pixels of each box read once, each crop written once."""
    return 3 * (int(boxes[:, 2:].prod(1).sum()) + case.crops * case.size**2)


def check(name: str, case: Case, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `RuntimeError` where crops differ by more than rounding."""
    off = (found.int() - expected.int()).abs()
    if off.max() > 1 or off.float().mean() > _OFF_BY_ONE:
        raise RuntimeError(
            f"crop: {name} at {case} is off by up to {off.max().item()} levels and by {off.float().mean().item():.2g} "
            "on average from eager"
        )


def measure(results: Results, case: Case, device: torch.device, seconds: float, bandwidth: float) -> None:
    """Time every variant of one case in turns and write their lines."""
    boxes, indices = draw_boxes(case), torch.arange(case.crops // _VIEWS).repeat(_VIEWS)
    shape = (case.crops // _VIEWS, case.stored, case.stored, 3)
    count = max(2, 200_000_000 // int(np.prod(shape))) if device.type == "cuda" else 2
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(count)]
    functions = variants(device, case.size, boxes, indices)
    expected = functions["eager"](sets[0])
    for name, function in functions.items():
        check(name, case, function(sets[0]), expected)
    bound = {name: lambda i, f=f: f(sets[i % len(sets)]) for name, f in functions.items()}
    time_kernel(
        results,
        "crop",
        vars(case),
        bound,
        device,
        bytes_moved=bytes_moved(case, boxes),
        bandwidth=bandwidth,
        seconds=seconds,
        repeats=_REPEATS[device.type],
        calls=_CALLS[device.type],
        each=("crop", case.crops),
    )


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Every case of the device; about `minutes` long, compilation included."""
    bandwidth = copy_bandwidth(device)
    for case in CASES[device.type]:
        measure(results, case, device, minutes * 60 / len(CASES[device.type]), bandwidth)


if __name__ == "__main__":
    sys.exit(command(run, "crop", "Time crops out of a store.", minutes=1.0))
