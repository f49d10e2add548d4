"""Files that cannot be decoded: named, counted, replaced; the run goes on, or stops with the list."""

import os
import shutil
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.data import rng
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import EvaluationLoader
from fastsiam.data.skip_list import SkipFile, SkipList
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.open import open_source
from fastsiam.train import main
from tests.support.loaders import CPU, SIZE, SPEC, make
from tests.support.refusals import refuses
from tests.support.runs import lines

BACKENDS = ("dali", "pil")
# In the order of their names in the folder `photos`: indices 0, 9 and 14.
TRUNCATED, EMPTY, TEXT = "class0/00.jpg", "class2/10.jpg", "class3/11.jpg"


@pytest.fixture
def damaged(photos, tmp_path):
    """The folder `photos` with three bad files; gives the folder and their indices."""
    root = tmp_path / "damaged"
    shutil.copytree(photos, root)
    whole = (root / TRUNCATED).read_bytes()
    (root / TRUNCATED).write_bytes(whole[: len(whole) * 2 // 3])
    (root / EMPTY).write_bytes(b"")
    (root / TEXT).write_text("not a picture")
    source = open_source(str(root))
    indices = [list(source.names).index(name.encode()) for name in (TRUNCATED, EMPTY, TEXT)]
    return root, indices


def reporting(source, fraction=0.5):
    """A skip list, and what it reports."""
    told = []
    return SkipList(len(source), fraction, report=lambda *found: told.append(found)), told


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_files_are_named_once_and_others_take_their_place(photos, damaged, backend):
    root, bad = damaged
    source = open_source(str(root))
    skip, told = reporting(source)
    made = make(root, backend, skip=skip, batch_size=4)
    found = list(made.epoch(0))
    assert sorted(index for index, _, _ in told) == sorted(bad)
    assert [count for _, _, count in told] == [1, 2, 3]
    for index, reason, _ in told:
        assert reason.startswith(f"{source.name(index)} cannot be decoded")
    order = rng.epoch_order(0, 0, 16)
    came = np.concatenate([batch.indices for batch in found])
    assert len(came) == 16
    assert (came[~np.isin(order, bad)] == order[~np.isin(order, bad)]).all()
    assert not np.isin(came, bad).any()
    clean = {i: v for batch in make(photos, backend, batch_size=4).epoch(0) for i, v in _views(batch)}
    for number, batch in enumerate(found):
        for place, (index, views) in enumerate(_views(batch)):
            if order[4 * number + place] == index:
                assert torch.equal(views, clean[index])
    told.clear()
    for epoch in (1, 2):
        batches = list(made.epoch(epoch))
        assert not np.isin(np.concatenate([batch.indices for batch in batches]), bad).any()
    assert told == []


def _views(batch):
    """The index of each image and its views [V, 3, S, S]."""
    return zip(batch.indices.tolist(), batch.views[0].view(2, -1, 3, SIZE, SIZE).transpose(0, 1), strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_going_on_in_mid_epoch_gives_what_an_undisturbed_run_gives(damaged, backend):
    root, _ = damaged
    source = open_source(str(root))
    skip, _ = reporting(source)
    whole = list(make(root, backend, skip=skip, batch_size=4).epoch(0))
    again = make(root, backend, skip=SkipList(16, 0.5, known=skip.mask), batch_size=4)
    for batch, same in zip(whole[2:], again.epoch(0, cursor=8), strict=True):
        assert batch.indices.tolist() == same.indices.tolist()
        assert torch.equal(batch.views[0], same.views[0])


@pytest.mark.parametrize(("backend", "workers"), [("dali", 3), ("pil", 2)])
def test_batches_under_way_in_other_workers_do_not_come_twice(damaged, backend, workers):
    root, _ = damaged
    expected = list(make(root, backend, skip=SkipList(16, 0.5), batch_size=2).epoch(0))
    made = make(root, backend, skip=SkipList(16, 0.5), batch_size=2, workers=workers)
    for batch, same in zip(made.epoch(0), expected, strict=True):
        assert batch.indices.tolist() == same.indices.tolist()
        assert torch.equal(batch.views[0], same.views[0])
    made.backend.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_stop_with_the_list(damaged, backend):
    root, _ = damaged
    skip, _ = reporting(range(16), fraction=2.5 / 16)
    with refuses("too-many-bad-images") as error:
        list(make(root, backend, skip=skip, batch_size=4).epoch(0))
    assert len(skip.found) == 3
    for name in (TRUNCATED, EMPTY, TEXT):
        assert f"{root}/{name} cannot be decoded" in str(error.value)


def test_replacements_depend_on_epoch_and_image_alone():
    indices, skipped = np.arange(100), np.zeros(100, bool)
    skipped[::3] = True
    first = rng.replace_skipped(5, 0, indices, skipped)
    assert (first[~skipped] == indices[~skipped]).all()
    assert not skipped[first].any()
    assert (rng.replace_skipped(5, 0, indices[::-1], skipped)[::-1] == first).all()
    assert (rng.replace_skipped(5, 1, indices, skipped) != first).sum() > 20
    # 34 draws over 66 images: far from all the same.
    assert len(set(first[skipped].tolist())) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_leaves_them_out(photos, damaged, backend):
    root, bad = damaged
    rest = np.setdiff1d(np.arange(16), bad)

    def evaluate(folder, indices, fraction):
        source = open_source(str(folder))
        opened = open_backend(backend, source, (SIZE,), 5, 1 if backend == "dali" else 0, CPU)
        skip = SkipList(16, fraction)
        loader = EvaluationLoader(source, SPEC, opened, batch_size=5, crop_ratio=0.875, dtype=torch.float32, skip=skip)
        batches = list(loader.batches(indices))
        return np.concatenate([batch.indices for batch in batches]), torch.cat([batch.images for batch in batches])

    indices, views = evaluate(root, None, 0.5)
    assert indices.tolist() == rest.tolist()
    assert torch.equal(views, evaluate(photos, rest, 0.0)[1])


def test_what_a_run_has_found_it_knows_again(damaged, tmp_path):
    root, bad = damaged
    source = open_source(str(root))
    file = SkipFile(tmp_path / "skip.tsv", source)
    assert not file.known().any()
    file.add(bad[1], "it is empty\nand that is all")
    assert np.flatnonzero(SkipFile(tmp_path / "skip.tsv", source).known()).tolist() == [bad[1]]
    assert (tmp_path / "skip.tsv").read_bytes() == f"{EMPTY}\tit is empty and that is all\n".encode()
    source.kinds[3] = UNREADABLE
    assert np.flatnonzero(file.known()).tolist() == sorted([3, bad[1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_and_tells(tiny, demo_folder, tmp_path, capsys, backend):
    """And a run that knew the bad files from its start computes the same."""
    root = tmp_path / "images"
    shutil.copytree(demo_folder, root)
    damaged = sorted((root / "train").rglob("*.jpg"))[5::30]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:300])
    (worse,) = sorted((root / "val").rglob("*.jpg"))[:1]
    worse.write_bytes(b"")
    more = (f"data.train={root}/train", f"data.val={root}/val", f"data.backend={backend}", "data.max_bad_fraction=0.1")
    assert main(["--config", "quickstart", *tiny(*more)]) == 0
    first = lines(tmp_path / "runs/run")
    bad = [line for line in first if line["kind"] == "bad_file"]
    assert {line["message"].partition(" cannot")[0] for line in bad} == {*map(str, damaged), str(worse)}
    assert [line["bad_files"] for line in bad if "/train/" in line["message"]] == [1, 2, 3]
    assert first[-1]["status"] == "done"
    assert f"bad file  {damaged[0]} cannot be decoded" in capsys.readouterr().out
    # The second run is given the list and finds nothing more.
    (tmp_path / "runs/knows").mkdir()
    for name in ("skip.tsv", "skip_val.tsv", "config.yaml"):
        shutil.copy(tmp_path / "runs/run" / name, tmp_path / "runs/knows" / name)
    assert main(["--config", "quickstart", *tiny(*more, "run.name=knows")]) == 0
    second = lines(tmp_path / "runs/knows")
    assert not [line for line in second if line["kind"] == "bad_file"]
    losses = ([line["loss"] for line in found if line["kind"] == "train"] for found in (first, second))
    assert next(losses) == next(losses)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_that_is_no_text_is_told_and_known_again(photos, tmp_path, backend):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / os.fsdecode(b"class0/\xff.jpg")).write_bytes(b"not a picture")
    source = open_source(str(root))
    file, told = SkipFile(tmp_path / "skip.tsv", source), []

    def report(index, reason, count):
        file.add(index, reason)
        told.append(reason)

    skip = SkipList(len(source), 0.5, report=report)
    assert len(list(make(root, backend, skip=skip, batch_size=4).epoch(0))) == 4
    assert "class0/\\xff.jpg cannot be decoded" in told[0]
    assert np.flatnonzero(file.known()).tolist() == np.flatnonzero(skip.mask).tolist()
    assert skip.mask.sum() == 1


@pytest.fixture
def transparent(tmp_path):
    """24 PNGs with an alpha channel, which reach DALI as bitmaps."""
    root = tmp_path / "transparent"
    root.mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(generator.integers(0, 256, (30, 40, 4), np.uint8)).save(root / f"{number:02}.png")
    return root


def test_bitmaps_live_as_long_as_their_batch(transparent, tmp_path, monkeypatch):
    from fastsiam.data.backends.dali import PREFETCH

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    made = make(transparent, "dali", batch_size=2)
    left = [len(list((tmp_path / "temporary").rglob("*.bmp"))) for _ in made.epoch(0)]
    assert len(left) == 12
    assert 2 <= max(left) <= 2 * (PREFETCH + 1)
    assert left[-1] == 0
    made.backend.close()
    assert not list((tmp_path / "temporary").iterdir())


def test_bitmaps_that_cannot_be_written_are_one_sentence(transparent, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with refuses("conversion-unwritten"):
        list(make(transparent, "dali", batch_size=4).epoch(0))
