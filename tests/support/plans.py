"""Measurements of a plan with known numbers."""

import dataclasses

from fastsiam.data.bottleneck import Loading
from fastsiam.plan.results import BatchRate, Checkpoint, LoaderRate, Measured, Rate

LOADING = Loading("dali", 16, 16, True, False, 256, 10**12, 10**10)


def rates(median: float, spread: float = 0.01) -> Rate:
    """Returns the rate of three windows."""
    return Rate.of((median * (1 - spread), median, median * (1 + spread)))


def measured(step: float = 1000.0, loader: float = 2000.0, **changes) -> Measured:
    """Returns measurements of ImageNet at batch 512 on one GPU; `step` and `loader` in images per second."""
    found = Measured(
        device="cuda",
        gpu="NVIDIA H100",
        dtype="bf16",
        compile=True,
        ranks=1,
        images=1_281_167,
        val_images=50_000,
        measured_batch_size=512,
        backend="dali",
        loader="dali 2.0",
        images_per_second=rates(min(step, loader)),
        wait_fraction=0.0,
        idle_cores=0.2,
        disk_cores=0.0,
        joules_per_image=0.5,
        energy="NVML total energy",
        step_images_per_second=rates(step),
        loaders=(LoaderRate("dali", rates(loader)),),
        batch_sizes=(BatchRate(512, 0.1, rates(step)),),
        seconds_per_image={
            "disk": 1 / 9000,
            "decoding": 1 / loader,
            "augmentation": 1 / 8000,
            "step": 1 / step,
            "communication": None,
        },
        start_seconds=30.0,
        compile_seconds=60.0,
        knn_seconds=120.0,
        collapse_seconds=0.1,
        checkpoint=Checkpoint(300_000_000, 2.0),
        notes=(),
        measuring_seconds=60.0,
    )
    return dataclasses.replace(found, **changes)
