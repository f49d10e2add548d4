"""Benchmarks of single kernels: their bytes, their lines, and their refusal to time a wrong implementation."""

import importlib
import json

import numpy as np
import pytest
import torch

from benchmarks import crop, loss
from benchmarks.harness import timing
from benchmarks.harness.results import Results
from benchmarks.harness.tiny import small_sizes
from benchmarks.tables import TABLES, render
from fastsiam.kernels.reference import crop_resize_ref

CPU = torch.device("cpu")
LOSS_ROWS = ["fused", "eager", "authors", "compile"]
CROP = crop.Case(crops=6, stored=20, size=12)


def lines(folder):
    (path,) = folder.glob("*.jsonl")
    return [json.loads(text) for text in path.read_text().splitlines()]


def check_numbers(line, bytes_moved):
    """Compare the numbers of a line with its median, for a copy bandwidth of 2e9 bytes/s."""
    rate = bytes_moved / line["median_seconds"]
    assert line["gigabytes_per_second"] == pytest.approx(rate / 1e9)
    assert line["share_of_copy_bandwidth"] == pytest.approx(rate / 2e9)
    assert line["peak_memory_bytes"] is line["launches"] is None


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1024)


def test_boxes_lie_in_the_store_and_cover_the_papers_range_of_areas():
    boxes = crop.draw_boxes(crop.Case(1000, 160, 160))
    assert boxes.shape == (1000, 4)
    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 160 + 1e-4
    areas = boxes[:, 2:].prod(1) / 160**2
    assert 0.19 < areas.min() < 0.22
    assert 0.95 < areas.max() <= 1
    # 0.6 would be the mean if boxes of large area and wrong shape fitted into the image.
    assert 0.4 < areas.mean() < 0.6


def test_bytes_moved():
    """Crops: boxes read, crops written. Loss of 3 rows of 2,048: 4 reads, then 4 reads and 2 writes."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [5, 5, 10, 2.5]])
    assert crop.bytes_moved(crop.Case(2, 20, 12), boxes) == 3 * (400 + 25 + 2 * 144)
    assert loss.bytes_moved(loss.Case(3, "bf16", "forward")) == 4 * 3 * 2048 * 2
    assert loss.bytes_moved(loss.Case(3, "fp32", "backward")) == 6 * 3 * 2048 * 4
    assert loss.bytes_moved(loss.Case(3, "bf16", "both")) == 10 * 3 * 2048 * 2


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("loss", ["eager", "authors", "compile"]),
        ("augment", ["numba", "eager", "compile"]),
        ("crop", ["numba", "eager", "compile"]),
    ],
)
def test_lines_of_the_smallest_sizes(tmp_path, monkeypatch, name, variants):
    """As first_light.sh tries them, without the compiler."""
    module = importlib.import_module(f"benchmarks.{name}")
    for constant, value in small_sizes(name, module).items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("benchmarks.harness.time_kernel.copy_bandwidth", lambda device: 2e9)
    module.run(Results(tmp_path, CPU), device=CPU, minutes=0)
    found = lines(tmp_path)
    assert render(TABLES[name], found)
    assert [line["variant"] for line in found] == variants * (len(found) // 3)
    assert len(found) == (18 if name == "loss" else 3)
    for line in found:
        case = module.Case(**{key: value for key, value in line["params"].items() if key != "dim"})
        check_numbers(line, module.bytes_moved(case, *([crop.draw_boxes(case)] if name == "crop" else [])))
        each = {"augment": "view", "crop": "crop"}.get(name)
        if each:
            assert line[f"ms_per_{each}"] == pytest.approx(line["ms"] / getattr(case, f"{each}s"))


def test_crops_are_those_of_the_kernel_and_the_reference(monkeypatch):
    monkeypatch.setattr(crop.torch, "compile", lambda function, fullgraph: function)
    boxes, indices = crop.draw_boxes(CROP), torch.tensor([0, 1, 2] * 2)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8))
    functions = crop.variants(CPU, CROP.size, boxes, indices)
    assert list(functions) == ["numba", "eager", "compile"]
    expected = crop_resize_ref(images, boxes, CROP.size, indices)
    for name, function in functions.items():
        crop.check(name, CROP, function(images), expected)


def test_modes_of_the_loss_compute_what_they_are_called():
    sets = loss.input_sets(loss.Case(4, "fp32", "both"), CPU, 1)
    p1, p2, z1, z2 = sets[1]
    value = loss.negative_cosine_ref(p1, p2, z1, z2)
    expected = torch.autograd.grad(value, (p1, p2))
    assert len(sets) == 3
    torch.testing.assert_close(loss.bind(loss.authors_loss, "forward", sets)(4), value)
    for mode in ("backward", "both"):
        function = loss.bind(loss.authors_loss, mode, sets)
        for i in (1, 4):
            torch.testing.assert_close(function(i), expected)


def half(*inputs):
    return loss.authors_loss(*inputs) / 2


def double_gradient_of_p2(p1, p2, z1, z2):
    return loss.authors_loss(p1, 2 * p2 - p2.detach(), z1, z2)


def test_a_wrong_implementation_is_not_timed():
    case = loss.Case(4, "fp32", "forward")
    inputs = loss.input_sets(case, CPU, 1)[0]
    loss.check("authors", loss.authors_loss, case, inputs)
    for wrong in (half, double_gradient_of_p2):
        with pytest.raises(RuntimeError):
            loss.check("wrong", wrong, case, inputs)
    expected = torch.full((2, 40, 40, 3), 7, dtype=torch.uint8)
    rounded = expected.clone()
    rounded[0, 0, :2] += 1
    crop.check("rounding", CROP, rounded, expected)
    spots = rounded.clone()
    spots[0, 0, 0] += 2
    for wrong in (expected // 2, spots, expected + 1):
        with pytest.raises(RuntimeError):
            crop.check("wrong", CROP, wrong, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("measure", "case", "names"),
    [
        (crop.measure, crop.Case(64, 64, 32), ["triton", "eager", "compile"]),
        *(
            (loss.measure, loss.Case(512, "bf16", mode), ["fused", "eager", "authors", "compile"])
            for mode in loss.MODES
        ),
    ],
)
def test_lines_of_a_gpu(tmp_path, measure, case, names):
    device = torch.device("cuda", 0)
    measure(Results(tmp_path, device), case, device, 5.0, timing.copy_bandwidth(device))
    assert [line["variant"] for line in lines(tmp_path)] == names
    assert all(line["launches"] >= 1 for line in lines(tmp_path))
    assert measure is loss.measure or lines(tmp_path)[0]["launches"] == 1
