"""Small configs and a machine, for tests of benchmarks."""

import torch

from fastsiam.config import load_config

CPU = torch.device("cpu")

SMALL = (
    "model.encoder=cifar_resnet8",
    "model.width=8",
    "method.predictor.hidden=16",
    "views.size=16",
    "train.batch_size=8",
    "train.device=cpu",
    "train.compile=off",
    "train.precision=fp32",
    "data.backend=synthetic",
    "optimizer.base_lr=0.64",
)

MACHINE = {
    "gpu": None, "driver": None, "power_limit_watts": None, "cpu": "AMD EPYC", "cores": 2, "threads": 2,
    "torch": "2.15.0", "triton": "3.9.0", "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False,
    "date": "2026-01-31T10:00:00+00:00",
}  # fmt: skip


def small_config(layers=3, *more):
    """CIFAR's ResNet-8 with 8 channels at 16 px and a learning rate of 0.02."""
    projector = f"method.projector={{layers: {layers}, hidden: 64, out: 64}}"
    return load_config("r18_cifar10_800ep", [*SMALL, projector, *more])


def batches(count, images=8, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 * images, 3, size, size, generator=generator, dtype=dtype) for _ in range(count)]
