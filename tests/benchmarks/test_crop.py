"""benchmarks.crop: the lines that it writes, and that it times nothing that is wrong."""

import json

import numpy as np
import pytest
import torch

from benchmarks import crop
from benchmarks.harness import timing
from benchmarks.harness.results import Results
from fastsiam.kernels import crop_resize
from fastsiam.kernels.reference import crop_resize_ref

CPU = torch.device("cpu")
CASE = crop.Case(crops=6, stored=20, size=12)


def test_boxes_lie_in_the_store_and_cover_the_papers_range_of_areas():
    boxes = crop.draw_boxes(crop.Case(1000, 160, 160))
    assert boxes.shape == (1000, 4)
    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 160 + 1e-4
    areas = boxes[:, 2:].prod(1) / 160**2
    assert 0.19 < areas.min() < 0.22
    assert 0.95 < areas.max() <= 1
    # A mean of 0.6 without those of large area and wrong shape, which do not fit into the image.
    assert 0.4 < areas.mean() < 0.6


def test_bytes_are_those_of_the_boxes_and_of_the_crops():
    boxes = torch.tensor([[0.0, 0, 20, 20], [5, 5, 10, 2.5]])
    assert crop.bytes_moved(crop.Case(2, 20, 12), boxes) == 3 * (400 + 25 + 2 * 144)


def test_lines(tmp_path, monkeypatch):
    """One case without torch.compile, and the numbers that follow from its median."""
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1024)
    monkeypatch.setattr(crop, "_REPEATS", {"cpu": 3})

    def plain(device, size, boxes, indices):
        assert indices.tolist() == [0, 1, 2, 0, 1, 2]
        return {
            "numba": lambda images: crop_resize(images, boxes, size, indices),
            "eager": lambda images: crop_resize_ref(images, boxes, size, indices),
        }

    monkeypatch.setattr(crop, "variants", plain)
    crop.measure(Results(tmp_path, CPU), CASE, CPU, 5.0, bandwidth=2e9)
    lines = [json.loads(text) for text in (tmp_path / "crop.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["numba", "eager"]
    for line in lines:
        rate = crop.bytes_moved(CASE, crop.draw_boxes(CASE)) / line["median_seconds"]
        assert line["params"] == {"crops": 6, "stored": 20, "size": 12}
        assert line["ms_per_crop"] == pytest.approx(line["median_seconds"] * 1000 / 6)
        assert line["gigabytes_per_second"] == pytest.approx(rate / 1e9)
        assert line["share_of_copy_bandwidth"] == pytest.approx(rate / 2e9)
        assert line["peak_memory_bytes"] is line["launches"] is None


def test_the_variants_are_the_kernel_and_the_reference(monkeypatch):
    monkeypatch.setattr(crop.torch, "compile", lambda function, fullgraph: function)
    boxes, indices = crop.draw_boxes(CASE), torch.tensor([0, 1, 2] * 2)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8))
    functions = crop.variants(CPU, CASE.size, boxes, indices)
    assert list(functions) == ["numba", "eager", "compile"]
    expected = crop_resize_ref(images, boxes, CASE.size, indices)
    for name, function in functions.items():
        crop.check(name, CASE, function(images), expected)


def test_crops_that_are_wrong_are_not_timed():
    expected = torch.full((2, 40, 40, 3), 7, dtype=torch.uint8)
    few = expected.clone()
    few[0, 0, :2] += 1
    crop.check("rounding", CASE, few, expected)
    with pytest.raises(RuntimeError, match="crop: half at .* is off by up to 4 levels and by 4 on average"):
        crop.check("half", CASE, expected // 2, expected)
    few[0, 0, 0] += 2
    with pytest.raises(RuntimeError, match="crop: spots at .* is off by up to 3 levels"):
        crop.check("spots", CASE, few, expected)
    with pytest.raises(RuntimeError, match="off by up to 1 levels and by 1 on average"):
        crop.check("brighter", CASE, expected + 1, expected)


@pytest.mark.gpu
def test_lines_of_a_gpu(tmp_path):
    device = torch.device("cuda", 0)
    crop.measure(Results(tmp_path, device), crop.Case(64, 64, 32), device, 5.0, timing.copy_bandwidth(device))
    lines = [json.loads(text) for text in (tmp_path / "crop.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["triton", "eager", "compile"]
    assert lines[0]["launches"] == 1
