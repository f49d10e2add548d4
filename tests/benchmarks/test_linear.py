"""The benchmark of linear evaluation: each row is a whole evaluation of the same encoder on the same images."""

import json

import pytest

from benchmarks import linear
from tests.support.encoders import random_encoder
from tests.support.processes import run_python


@pytest.mark.slow
@pytest.mark.needs("lightly", "sklearn")
def test_every_row_evaluates_the_same_images(demo_folder, tmp_path):
    """In a process of its own: lightly's loader starts a server of processes that ends at signals ours outlives."""
    encoder = random_encoder(tmp_path / "encoder.safetensors")
    sizes = ("--classes", "6", "--train", "48", "--val", "24", "--epochs", "1", "--batch", "16", "--passes", "1")
    arguments = [str(encoder), "--data", str(demo_folder), *sizes, "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run_python("-m", "benchmarks.linear", *arguments).returncode == 0
    lines = [json.loads(text) for text in (tmp_path / "out/linear.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(linear.ROWS)
    for line in lines:
        assert line["params"] == {"images": 48, "classes": 6, "epochs": 1, "batch": 16}
        # A whole number of 24 images.
        assert line["top1"] * 24 / 100 == pytest.approx(round(line["top1"] * 24 / 100), abs=1e-3)


def test_classes_of_unequal_size_are_refused(demo_folder, tmp_path, capsys):
    encoder = random_encoder(tmp_path / "encoder.safetensors")
    assert linear.main([str(encoder), "--data", str(demo_folder), "--classes", "10", "--train", "55"]) == 2
    assert "unequal-classes" in capsys.readouterr().err
