"""Crops from a resident store: the kernel (numba on a CPU, Triton on CUDA) beside plain torch and torch.compile.

Plain torch gathers the images and multiplies them by dense matrices of weights, all of fp32. The public function is
timed: on a CPU with its checks of the boxes, on CUDA the device's part.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.time_kernel import FUSED, image_sets, on_sets, time_cases, time_kernel
from fastsiam.config.views import ViewSpec
from fastsiam.data.backends.resident import boxes_in_store
from fastsiam.data.rng import crop_boxes
from fastsiam.kernels import crop_resize
from fastsiam.kernels.reference import crop_resize_ref

# Two crops of an image, as a step takes them.
_VIEWS = 2
# ImageNet's most frequent shape, for which the boxes are drawn.
_HEIGHT, _WIDTH = 375, 500
# Largest share of pixels that may differ by one level, through rounding.
_OFF_BY_ONE = 0.01


@dataclass(frozen=True)
class Case:
    """Problem: number of crops, from half as many images, their stored size and the size of a crop."""

    crops: int
    stored: int
    size: int


CASES = {
    "cuda": [Case(1024, 160, 160), Case(1024, 256, 224), Case(1024, 32, 32)],
    "cpu": [Case(64, 160, 160), Case(64, 256, 224), Case(256, 32, 32)],
}


def draw_boxes(case: Case) -> torch.Tensor:
    """Returns random resized crops of the paper's range of areas, fp32 [crops, 4] in pixels of the store."""
    images = case.crops // _VIEWS
    sizes = np.tile(np.array([_HEIGHT, _WIDTH], np.int32), (images, 1))
    spec = ViewSpec(size=case.size, color="matrix")
    boxes = [crop_boxes(spec, 0, 0, np.arange(images), view, sizes) for view in range(_VIEWS)]
    return torch.from_numpy(boxes_in_store(np.stack(boxes), sizes, case.stored)).view(-1, 4)


def variants(device: torch.device, size: int, boxes: torch.Tensor, indices: torch.Tensor) -> dict[str, Callable]:
    """Returns functions of the images by name; torch.compile gets boxes and indices on the device."""
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(crop_resize_ref, size=size), fullgraph=True)
    there = {"boxes": boxes.to(device), "indices": indices.to(device)}
    return {
        FUSED[device.type]: lambda images: crop_resize(images, boxes, size, indices),
        "eager": lambda images: crop_resize_ref(images, boxes, size, indices),
        "compile": lambda images: compiled(images, **there),
    }


def bytes_moved(case: Case, boxes: torch.Tensor) -> int:
    """Returns the least to move: the pixels of each box read once, each crop written once."""
    return 3 * (int(boxes[:, 2:].prod(1).sum()) + case.crops * case.size**2)


def check(name: str, case: Case, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises `RuntimeError` where crops differ by more than rounding."""
    off = (found.int() - expected.int()).abs()
    if off.max() > 1 or off.float().mean() > _OFF_BY_ONE:
        raise RuntimeError(
            f"crop: {name} at {case} is off by up to {off.max().item()} levels and by {off.float().mean().item():.2g} "
            "on average from eager"
        )


def measure(results: Results, case: Case, device: torch.device, seconds: float, bandwidth: float) -> None:
    """Times every variant of one case in turns and writes their lines."""
    boxes, indices = draw_boxes(case), torch.arange(case.crops // _VIEWS).repeat(_VIEWS)
    sets = image_sets((case.crops // _VIEWS, case.stored, case.stored, 3), device)
    functions = variants(device, case.size, boxes, indices)
    expected = functions["eager"](sets[0])
    for name, function in functions.items():
        check(name, case, function(sets[0]), expected)
    time_kernel(
        results,
        "crop",
        vars(case),
        {name: on_sets(function, sets) for name, function in functions.items()},
        device,
        bytes_moved=bytes_moved(case, boxes),
        bandwidth=bandwidth,
        seconds=seconds,
        each=("crop", case.crops),
    )


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Measures every case of the device for about `minutes`, compilation included."""
    time_cases(measure, results, CASES[device.type], device, minutes)


if __name__ == "__main__":
    sys.exit(command(run, "crop", "Time crops from a store.", minutes=1.0))
