"""The data path of a GPU, as far as a CPU can tell: its graph, its crops, and memory that a device still reads."""

import itertools
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.data.sources.open import open_source
from fastsiam.kernels import crop_triton
from tests.support.lanes import LateLane
from tests.support.loaders import CPU, RECIPE, SIZE, count_decoders, crops_of, make

pytestmark = pytest.mark.usefixtures("resident_cache")


@pytest.fixture
def scenes(tmp_path):
    """10 PNGs, which every decoder decodes alike, with contrast up to their edges."""
    generator = np.random.default_rng(1)
    for number in range(10):
        height, width = generator.integers(30, 240, 2)
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        # Coarse in some, fine in others; the outermost pixels are none of their neighbours'.
        coarse = Image.fromarray(pixels).resize((max(width // 8, 1), max(height // 8, 1)), Image.Resampling.BOX)
        image = coarse.resize((width, height), Image.Resampling.BICUBIC) if number % 2 else Image.fromarray(pixels)
        image.save(tmp_path / f"{number:02d}.png")
    return tmp_path


def on_a_gpu(monkeypatch, made):
    """The GPU's way with the CPU's decoder: the same graph, and the kernel in Triton's interpreter."""
    monkeypatch.setattr(made.backend, "_crop", partial(crop_triton.crop_scattered, device=CPU))
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled, and cannot read the host's memory")
def test_the_graph_for_a_gpu_crops_as_pil_does(scenes, monkeypatch):
    """To one level in every pixel, most of all in the outer ring: there filters meet what is not in the box.

    Boxes are enlarged and shrunk up to tenfold, and some touch the edges of their images.
    """
    decoders = count_decoders(monkeypatch)
    loaders = [make(scenes, backend, batch_size=5) for backend in ("dali", "pil")]
    on_a_gpu(monkeypatch, loaders[0])
    found, expected = map(crops_of, loaders)
    assert decoders == [("image", "cpu")]
    difference = (found.int() - expected.int()).abs()
    ring = torch.ones(SIZE, SIZE, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    assert len(difference) == 20
    assert difference[:, ring].max() <= 1
    assert difference[:, ~ring].max() <= 1
    assert difference[:, ring].float().mean() < 0.25


def test_the_graph_of_a_gpu_can_be_defined(photos, monkeypatch):
    """Operators, the names and types of their arguments, and what is computed where; no driver is asked yet."""
    from fastsiam.data.backends import dali

    decoders = count_decoders(monkeypatch)
    source = open_source(str(photos))
    source.look(np.arange(16))
    memory = dali.decoder_memory(source, 5, 4, 1 << 37)
    assert len(memory) == 4
    options = {"batch_size": 5, "num_threads": 4, "device_id": 0, "prefetch_queue_depth": dali.PREFETCH}
    for packed in (False, True):
        decoders.clear()
        dali.image_graph(lambda: None, "mixed", packed, memory, **options)
        assert decoders == [("image", "mixed")]


@pytest.mark.parametrize("backend", ["dali", RECIPE, "ffcv"])
def test_memory_that_a_device_still_reads_is_not_written_to(photos, backend):
    """Over two epochs, the first of them left early: every batch is copied or cropped as late as its mark allows."""
    made, plain = (make(photos, backend, batch_size=2) for _ in range(2))
    made.backend._lane = LateLane()

    def crops(loader, epoch, count):
        batches = loader.backend.crops(loader._requests(epoch, 0, deque()))
        found = [crops for _, (crops,) in itertools.islice(batches, count)]
        batches.close()
        return found

    found, expected = (crops(loader, 0, 3) + crops(loader, 1, 8) for loader in (made, plain))
    made.backend.close()
    assert len(found) == 11
    for late, right in zip(found, expected, strict=True):
        assert torch.equal(late, right)
