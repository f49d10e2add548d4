"""Choices that measurements of a plan depend on."""

import dataclasses

from fastsiam.data import rng
from fastsiam.data.sources.open import open_source
from fastsiam.plan.loaders import sample_of
from fastsiam.plan.steps import Affordable, Probe, largest_affordable, other_batch_sizes


def test_batches_too_slow_or_too_large_for_a_cpu_are_measured_smaller():
    affordable = Affordable(Probe(seconds=0.1, bytes=1e9), seconds=10.0, memory=200 * 10**9)
    assert affordable.refusal(50) is None
    assert affordable.refusal(51).startswith("a step takes about 5 s")
    assert affordable.refusal(256) == "does not fit the memory: about 256 GB, and 200 GB are free"
    assert largest_affordable(512, 1, affordable) == (32, affordable.refusal(512))
    assert largest_affordable(48, 1, affordable) == (48, None)
    assert Affordable(None, 1.0, 0).refusal(4096) is None
    assert other_batch_sizes(512, 1500, 1) == [256, 1024]
    assert other_batch_sizes(4, 100, 2) == [8, 16]


def test_a_sample_is_of_the_images_that_it_names(photos):
    source = open_source(str(photos))
    sample = sample_of(source, 3, seed=0)
    assert len(sample.source) == 16
    few = sample_of(dataclasses.replace(source, kinds=source.kinds.copy()), 3, seed=0)
    few.source.look(rng.probe_indices(0, 16, 4))
    for number, index in enumerate(sample.indices[:5].tolist()):
        assert sample.source.read(number) == source.read(index)
