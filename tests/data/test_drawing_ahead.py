"""Boxes and augmentations are drawn one batch ahead in a thread: the same numbers, and nothing left behind."""

import shutil
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastsiam.data import rng
from fastsiam.errors import UserError
from tests.support.loaders import make

MAIN = threading.main_thread()


def drawing_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("draws")]


def same(left, right):
    names = rng.AugmentDraws.__dataclass_fields__
    parts = zip(left.drawn, right.drawn, strict=True)
    arrays = [(getattr(a, name), getattr(b, name)) for a, b in parts for name in names]
    arrays += [(left.indices, right.indices), (left.sizes, right.sizes), *zip(left.boxes, right.boxes, strict=True)]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


@pytest.mark.parametrize("cursor", [0, 4, 12])
def test_requests_are_the_same_and_drawn_one_ahead(photos, cursor, monkeypatch):
    """When a batch is handed out the next one's draws have been asked for, and no other's."""
    made = make(photos, "pil", batch_size=4)
    expected = list(made._requests(1, cursor, deque()))
    asked, real = [], made._request
    monkeypatch.setattr(
        made, "_request", lambda *arguments: asked.append(threading.current_thread()) or real(*arguments)
    )
    with ThreadPoolExecutor(1) as pool:
        found = []
        for number, request in enumerate(made._requests(1, cursor, deque(), pool), 1):
            found.append(request)
            pool.submit(time.sleep, 0).result()
            assert len(asked) == min(number + 1, len(expected))
    assert MAIN not in asked
    assert len(found) == (16 - cursor) // 4
    assert all(map(same, found, expected))


@pytest.mark.parametrize("backend", ["pil", "dali", "resident"])
def test_the_thread_ends_with_its_epoch(photos, backend, resident_cache):
    made = make(photos, backend, batch_size=2)
    for count in (1, 3, 8):
        batches = made.epoch(0)
        for _ in range(count):
            next(batches)
        assert len(drawing_threads()) == 1
        batches.close()
        assert drawing_threads() == []
    list(made.epoch(0))
    assert drawing_threads() == []


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_an_error_in_the_thread_is_the_loaders(photos, backend, monkeypatch):
    """Met where the batch is asked for, whichever thread has met it; the next epoch is whole."""
    real = rng.crop_boxes

    def failing(spec, seed, epoch, indices, view, sizes):
        assert threading.current_thread() is not MAIN
        if epoch == 1 and 5 in indices:
            raise FloatingPointError("of the draws")
        return real(spec, seed, epoch, indices, view, sizes)

    monkeypatch.setattr(rng, "crop_boxes", failing)
    made = make(photos, backend, batch_size=2)
    with pytest.raises(FloatingPointError, match="of the draws"):
        list(made.epoch(1))
    assert drawing_threads() == []
    assert sum(len(batch.indices) for batch in made.epoch(0)) == 16


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_a_file_that_ends_the_run_ends_the_thread(photos, tmp_path, backend):
    shutil.copytree(photos, tmp_path / "photos")
    broken = sorted((tmp_path / "photos").rglob("*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=broken.name):
        list(make(tmp_path / "photos", backend, batch_size=2).epoch(0))
    assert drawing_threads() == []
