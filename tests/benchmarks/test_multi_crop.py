"""benchmarks.multi_crop: what its epochs deliver and how its lines compare, never timed."""

import json

import pytest
import torch

from benchmarks import multi_crop
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.loader import CPU, Case, files_of
from benchmarks.peers import AbsentError
from benchmarks.tables import TABLES, render


@pytest.fixture
def case(photos):
    """15 JPEGs as 24 images of 16 px, in batches of 8."""
    files = files_of(photos)
    return Case(tuple(files[index % len(files)] for index in range(24)), "photos", 16, 1, 8, CPU)


def test_views_have_the_numbers_of_swav():
    two, eight = multi_crop.groups_of(224, 96).values()
    assert [(group.count, group.spec.size, group.spec.crop_scale) for group in eight] == [
        (2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14)),
    ]  # fmt: skip
    assert two == eight[:1]


@pytest.mark.needs("dali")
def test_an_epoch_of_ours_delivers_every_image_with_all_views(case, monkeypatch):
    groups = multi_crop.groups_of(16, 8)["2 x 16 + 6 x 8"]
    seen, drain = [], multi_crop.drain

    def drained(batches, device):
        batches = list(batches)
        seen.extend([tuple(view.shape) for view in batch] for batch in batches)
        return drain(batches, device)

    monkeypatch.setattr(multi_crop, "drain", drained)
    epoch, description = multi_crop.ours(case, groups)
    assert epoch(0) == 24
    assert description.startswith("dali")
    assert seen == [[(8, 3, 16, 16)] * 2 + [(8, 3, 8, 8)] * 6] * 3


def test_lines_compare_eight_views_with_two_of_the_same_loader(case, tmp_path, monkeypatch):
    seconds = {"fastsiam, 2 x 16": 6.0, "fastsiam, 2 x 16 + 6 x 8": 8.0, "solo-learn, 2 x 16": 20.0,
               "solo-learn, 2 x 16 + 6 x 8": 50.0}  # fmt: skip
    called = []

    def interleave(rows, **_):
        for row in rows.values():
            row(0)
        called.extend(rows)
        return {name: Samples([seconds[name]] * 3) for name in rows}

    def fake(case, groups):
        return lambda index: len(case.paths), "a loader"

    def absent(case, groups):
        raise AbsentError("no DALI")

    monkeypatch.setattr(multi_crop, "interleave", interleave)
    builds = {"fastsiam": fake, "solo-learn": fake, "solo-learn DALI": absent}
    multi_crop.measure(Results(tmp_path, torch.device("cpu")), case, builds, 8, 1.0)
    assert called == list(seconds)
    lines = [json.loads(line) for line in (tmp_path / "multi_crop.jsonl").read_text().splitlines()]
    found = {(line["variant"], line["params"]["views"]): line for line in lines}
    ours, theirs = (found[name, "2 x 16 + 6 x 8"] for name in ("fastsiam", "solo-learn"))
    assert (ours["images_per_second"], ours["share_of_two_views"]) == (3.0, 0.75)
    assert (theirs["images_per_second"], theirs["share_of_two_views"]) == (0.48, 0.4)
    assert ours["goal"] == "0.6x: met"
    assert "goal" not in theirs
    assert found["fastsiam", "2 x 16"]["share_of_two_views"] == 1
    assert [line["absent"] for line in lines if "absent" in line] == ["no DALI"] * 2
    assert "0.750x" in render(TABLES["multi_crop"], lines)
