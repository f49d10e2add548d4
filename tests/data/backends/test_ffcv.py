"""ffcv's own: pixels, one decoding an image, nothing left behind. The contract is in test_loader.py."""

import os
import shutil
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest
import torch

from fastsiam.config import load_config
from fastsiam.data import rng
from fastsiam.data.backends import choose
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.sources.beton import index_path
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.prepare.ffcv import write_beton
from fastsiam.train import pretrain
from tests.support.ffcv_files import beton_of, stored_images
from tests.support.loaders import CPU, SIZE, crops_of, make
from tests.support.processes import run_python


def levels(source, backend="ffcv"):
    return crops_of(make(source, backend)).float()


def test_crops_of_the_same_pixels_are_pils_within_one_level(photos):
    difference = (levels(beton_of(photos, "raw")) - levels(open_source(str(photos)), "pil")).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.2


def test_crops_of_jpegs_are_near_pils_of_the_same_jpegs(photos, tmp_path):
    """The difference is libjpeg-turbo's fast DCT, 0.8 darker on average; with the exact one there is none."""
    for index, (_, jpeg) in enumerate(stored_images(beton_of(photos, "jpg").root)[0]):
        (tmp_path / f"{index:02d}.jpg").write_bytes(jpeg)
    difference = levels(beton_of(photos, "jpg")) - levels(open_source(str(tmp_path)), "pil")
    assert -1.0 < difference.mean() < -0.6
    assert difference.abs().mean((1, 2, 3)).max() < 1.5
    assert difference.abs().max() <= 8


def test_boxes_are_those_of_the_originals_however_far_they_were_shrunk(photos):
    """Photos of 40 to 200 px, shrunk to 80: the boxes are scaled with the images, in fractions of a pixel."""
    source = beton_of(photos, "raw", 80)
    request = next(make(source, "ffcv")._requests(0, 0, deque()))
    expected = next(make(photos, "pil")._requests(0, 0, deque()))
    assert (request.boxes[0] == expected.boxes[0]).all()
    assert max(max(pixels.shape) for _, pixels in stored_images(source.root)[0]) == 80
    difference = (levels(source) - levels(open_source(str(photos)), "pil")).abs()
    assert difference.mean() < 2.0


def test_each_image_is_decoded_once_for_both_views(photos, monkeypatch):
    """The loop as Python runs it, with decodings counted; compiled, it is the same code."""
    from fastsiam.data.backends import ffcv

    compiled, calls = levels(beton_of(photos, "jpg")), []
    monkeypatch.setattr(ffcv, "_decode_jpeg", lambda *a: calls.append(a[2:4]) or ffcv.imdecode(*a))
    monkeypatch.setattr(ffcv, "_decode_once", ffcv._decode_once.py_func)
    interpreted = levels(beton_of(photos, "jpg"))
    source = beton_of(photos, "jpg")
    order = rng.epoch_order(0, 0, 16)[:15]
    assert sorted(calls) == sorted(tuple(size) for size in source.image_sizes[order].tolist())
    assert len(interpreted) == 30
    assert torch.equal(interpreted, compiled)


def test_epochs_left_early_or_not_leave_neither_threads_nor_memory(photos, monkeypatch):
    from fastsiam.data.backends import ffcv

    decoding, real = set(), ffcv._decode_once
    monkeypatch.setattr(ffcv, "_decode_once", lambda *a: decoding.add(threading.current_thread()) or real(*a))
    made = make(beton_of(photos, "mixed"), "ffcv", batch_size=2, workers=2)

    def epochs(numbers):
        for number in numbers:
            batches = made.epoch(number)
            next(batches)
            if number % 2:
                assert sum(1 for _ in batches) == made.steps_per_epoch - 1
            batches.close()
            if number % 5 == 0:
                made.backend.close()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    epochs(range(4))
    threads, before = threading.active_count(), resident()
    epochs(range(30))
    assert threading.active_count() == threads
    # Each thread that decodes costs a decoder that ffcv never frees.
    assert len(decoding) <= 2
    assert resident() - before < 8


def test_leaving_early_waits_for_what_still_writes_to_the_buffers(photos, monkeypatch):
    from fastsiam.data.backends import ffcv

    running, real = [], ffcv._decode_once

    def slow(*arguments):
        running.append(arguments)
        time.sleep(0.05)
        real(*arguments)
        running.pop()

    made = make(beton_of(photos, "jpg"), "ffcv", batch_size=4, workers=2)
    monkeypatch.setattr(ffcv, "_decode_once", slow)
    leaving = made.backend.crops(made._requests(1, 0, deque()))
    next(leaving)
    while not running:
        time.sleep(0.001)
    leaving.close()
    assert running == []


@pytest.mark.parametrize("num_views", [1, 2])
def test_crops_that_are_kept_do_not_change(photos, num_views):
    made = make(beton_of(photos, "mixed"), "ffcv", batch_size=2, count=num_views, workers=2)
    kept = [(crops, crops.clone()) for _, (crops,) in made.backend.crops(made._requests(0, 0, deque()))]
    assert len(kept) == 8
    assert all(torch.equal(crops, then) for crops, then in kept)


@pytest.mark.slow
def test_torch_keeps_its_threads(photos):
    """ffcv sets their number to 1 when imported."""
    script = """
import sys, torch
torch.set_num_threads(3)
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.sources.open import open_source
open_backend("ffcv", open_source(sys.argv[1]), (8,), 4, 1, torch.device("cpu"))
print("ffcv" in sys.modules, torch.get_num_threads())
"""
    done = run_python("-c", script, beton_of(photos, "jpg").root)
    assert done.stdout.split() == ["True", "3"], done.stderr


def test_a_jpeg_damaged_after_writing_is_named(photos, tmp_path):
    source = beton_of(photos, "jpg")
    for path in (source.root, index_path(source.root)):
        shutil.copy(path, tmp_path / path.name)
    path = tmp_path / source.root.name
    record = stored_images(path)[0][9][0]
    with open(path, "r+b") as file:
        file.seek(int(record["data_ptr"]) + int(source.file_sizes[9]) // 2)
        file.write(b"\xff\xd9" * (int(source.file_sizes[9]) // 4))
    name = open_source(str(path)).name(9)
    with pytest.raises(UserError, match=f"{name} cannot be decoded: its JPEG in {path} is damaged"):
        list(make(open_source(str(path)), "ffcv", batch_size=16).epoch(0))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.backend=ffcv"], "data.train"),
        (["data.backend=ffcv", "data.train=x.beton"], "data.val"),
        (["data.backend=dali", "data.train=x.beton"], "data.train"),
        (["data.backend=pil", "data.val=x.beton"], "data.val"),
    ],
)
def test_a_backend_that_cannot_read_the_data_is_refused(overrides, key):
    with pytest.raises(UserError) as error:
        load_config("r50_100ep", overrides)
    assert error.value.key == key


def test_auto_takes_ffcv_for_a_beton_alone():
    assert choose.choose_backend("auto", "x.beton") == ("ffcv", "auto: a .beton")
    assert choose.choose_backend("ffcv", "x.beton") == ("ffcv", "asked for")
    assert choose.choose_backend("auto", "images")[0] == "dali"


@pytest.mark.parametrize("reason", ["No module named 'ffcv'", "libopencv_core.so.406: cannot open shared object file"])
def test_without_ffcv_the_extra_and_the_system_packages_are_named(monkeypatch, reason):
    """Not installed, and installed on a machine that lacks its shared libraries."""

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "ffcv":
                raise ImportError(reason)

    for name in list(sys.modules):
        if name.split(".")[0] == "ffcv" or name.startswith("fastsiam.data.backends.ffcv"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    absent = reason.startswith("No module")
    monkeypatch.setattr(choose.util, "find_spec", lambda name: None if absent and name == "ffcv" else object())
    with pytest.raises(ImportError, match=r"pkg-config libopencv-dev libturbojpeg0-dev .*pip install .*ffcv") as error:
        open_backend(choose.choose_backend("ffcv")[0], None, (SIZE,), 5, 1, CPU)
    assert reason in str(error.value)


def test_a_run_trains_and_evaluates_on_betons(demo_folder, tmp_path, tiny_config, capsys):
    places = {name: tmp_path / f"{name}.beton" for name in ("train", "val")}
    for name, path in places.items():
        write_beton(open_source(f"{demo_folder}/{name}"), path, stored_as="mixed")
    result = pretrain(tiny_config(*(f"data.{name}={path}" for name, path in places.items()), "train.epochs=1"))
    assert result.status == "done"
    assert 0 <= result.knn_top1 <= 100
    told = capsys.readouterr().out
    assert f"80 images under {places['train']}, 40 for kNN under {places['val']}" in told
    assert "backend   ffcv 1" in told
    assert "50% JPEG, longest side 48 px), auto: a .beton" in told
