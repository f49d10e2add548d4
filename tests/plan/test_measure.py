"""Choices that measurements of a plan depend on."""

from types import SimpleNamespace

import pytest
import torch

from fastsiam.data import rng
from fastsiam.data.sources.image_header import UNKNOWN
from fastsiam.data.sources.open import open_source
from fastsiam.plan.bench import Bench
from fastsiam.plan.loaders import sample_of
from fastsiam.plan.steps import Affordable, Stepper, other_batch_sizes, with_batch_size
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from tests.support.small_methods import CLASSES, one_convolution, small_config

SYNTHETIC = ("data.backend=synthetic", "train.batch_size=8")
MULTI_CROP = (
    "views=[{recipe: swav, size: 32, color: exact, count: 2}, {recipe: swav_small, size: 16, color: exact, count: 6}]"
)


def test_batches_too_slow_or_too_large_for_a_cpu_are_measured_smaller():
    affordable = Affordable(seconds_per_image=0.1, bytes_per_image=1e9, seconds=10.0, memory=200 * 10**9)
    assert affordable.refusal(50) is None
    # Too long, and too large.
    assert "5.1 s" in affordable.refusal(51)
    assert "256 GB" in affordable.refusal(256)
    assert (affordable.largest(512, ranks=1), affordable.largest(48, ranks=1)) == (32, 48)
    assert Affordable().refusal(4096) is None
    assert other_batch_sizes(512, 1500, 1) == [256, 1024]
    assert other_batch_sizes(4, 100, 2) == [8, 16]


def test_a_sample_is_of_the_images_that_it_names(photos):
    source = open_source(str(photos))
    # Another test may have read the headers, which the index cache keeps.
    source.kinds[:] = UNKNOWN
    sample = sample_of(source, 3, seed=0)
    assert len(sample) == len(source) == 16
    assert [sample.read(number) for number in range(5)] == [source.read(number) for number in range(5)]
    # What the sample learns of its images stays its own.
    sample.look(rng.probe_indices(0, 16, 4))
    assert (source.kinds == UNKNOWN).all()


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_of_each_method_is_measured_at_other_batch_sizes(name):
    """A queue is then of whole steps; averages are of the first images."""
    device = torch.device("cpu")
    runtime = Runtime(World(), device, torch.float32, False)
    config, options = small_config(name), {"device": device, "dtype": torch.float32, "world_size": 1}
    bench = SimpleNamespace(config=config, runtime=runtime, world=runtime.world, device=device, loader_options=options)
    for batch_size in (6, 16):
        with one_convolution():
            stepper = Stepper(bench, batch_size)
        stepper()
        assert stepper.method.encoder[0].weight.grad.abs().max() > 0
    if name == "moco":
        sizes = [with_batch_size(config, size, 1).method.queue for size in (4, 16, 48)]
        assert sizes == [24, 16, 48]


@pytest.mark.parametrize(
    ("method", "state", "expected"),
    [
        ("name: moco, queue: 64", "pointer", 16),
        ("name: swav, queue: 64", "filled", 16),
        ("name: simsiam_alternating, steps: 100", "step", 2),
        # The statistics of 8 views in each of two steps.
        ("name: byol", "target.projector.1.num_batches_tracked", 16),
        ("name: simsiam_average, images: 8", "eta", None),
    ],
)
def test_a_measured_step_does_what_a_method_does_around_the_optimizer(tiny_config, method, state, expected):
    """Two steps of 8 images: keys in a queue, steps counted, a second network with batch norms of its own."""
    two_views = "moco" in method or "average" in method
    config = tiny_config(*SYNTHETIC, f"method={{{method}}}", *([] if two_views else [MULTI_CROP]))
    with Runtime.of(config.train, World()) as runtime:
        stepper = Stepper(Bench(config, runtime, 1.0), 8)
        for _ in range(2):
            stepper()
    found = stepper.method.state_dict()[state]
    assert found.any() if expected is None else found.item() == expected
