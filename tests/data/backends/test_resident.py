"""The backend resident: its pixels, its one store for all, its cache, and what it says when there is no room."""

import dataclasses
import gc
import shutil
from collections import deque

import numpy as np
import pytest
import torch
from PIL import Image

import fastsiam
from fastsiam.config import load_config
from fastsiam.config.views import ViewGroup
from fastsiam.data import build
from fastsiam.data.backends import choose, decoded_cache, pil, resident
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import EvaluationLoader, Loader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.image_header import PLAIN, UNREADABLE, UNWANTED
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.kernels.crop_numba import crop_on_cpu
from tests.support.loaders import SPEC
from tests.support.processes import REPOSITORY
from tests.support.refusals import refuses
from tests.support.runs import lines

CPU = torch.device("cpu")
SAMPLE = REPOSITORY.parent / "shared/data/imagenet-sample"
pytestmark = pytest.mark.usefixtures("resident_cache")


@pytest.fixture(autouse=True)
def stores_of_other_tests_are_gone():
    gc.collect()


@pytest.fixture
def decoded(monkeypatch):
    """The indices that PIL decodes, in a world without DALI."""
    calls, real = [], pil.decode_image
    monkeypatch.setattr(choose, "dali_installed", lambda: False)
    monkeypatch.setattr(pil, "decode_image", lambda source, index: calls.append(index) or real(source, index))
    return calls


@pytest.fixture
def tiles(tmp_path):
    """12 images of noise, 32 px, in a format that loses nothing."""
    root = tmp_path / "tiles"
    root.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
    return root


def open_resident(source, store_size, size=24):
    return open_backend("resident", source, (size,), 4, 0, CPU, store_size)


def loader_of(source, backend, spec=SPEC, batch_size=4, skip=None):
    groups = (ViewGroup(2, spec),)
    return Loader(source, groups, backend, batch_size=batch_size, seed=0, dtype=torch.float32, skip=skip)


def crops_of(source, backend, size):
    """Requests of an epoch and the crops [V, N, S, S, 3] that come for them."""
    made = loader_of(source, backend, spec=dataclasses.replace(SPEC, size=size))
    requests = list(made._requests(0, 0, deque()))
    return [
        (request, crops.view(2, -1, size, size, 3))
        for request, (_, (crops,)) in zip(requests, backend.crops(requests), strict=True)
    ]


def differences(folder, store_size, size):
    """Crops out of a store less those of PIL, [V, crops, S, S, 3]."""
    source = open_source(str(folder))
    both = (open_resident(source, store_size, size), open_backend("pil", source, (size,), 4, 0, CPU))
    ours, theirs = (torch.cat([crops for _, crops in crops_of(source, one, size)], 1).float() for one in both)
    return ours - theirs


@pytest.mark.parametrize("size", [24, 32, 40])
def test_images_stored_at_their_own_size_are_cropped_as_the_decoded_files_are(tiles, size):
    source = open_source(str(tiles))
    found = crops_of(source, open_resident(source, 32, size), size)
    assert len(found) == 3
    for (request, crops), (_, pils) in zip(
        found, crops_of(source, open_backend("pil", source, (size,), 4, 0, CPU), size), strict=True
    ):
        images = [np.asarray(Image.open(source.path(index))) for index in request.indices]
        addresses = np.array([image.ctypes.data for image in images], np.int64)
        expected = crop_on_cpu(addresses, request.sizes, request.boxes[0], size)
        assert torch.equal(crops.flatten(0, 1), expected)
        assert (crops.int() - pils.int()).abs().max() <= 1


def test_images_stored_smaller_are_cropped_nearly_as_pil_does(tmp_path, photos):
    """Of ImageNet photographs at 160 px views of 96 px are 2.0 of 255 off PIL's on average, the worst crop 4.6."""
    root = SAMPLE if SAMPLE.is_dir() else photos
    names = sorted(str(path) for path in root.rglob("*.*") if path.suffix.lower() in (".jpg", ".jpeg"))[:12]
    for number, name in enumerate(names):
        shutil.copy(name, tmp_path / f"{number:02d}.jpg")
    off = differences(tmp_path, 160, 96)
    assert off.abs().mean() < 3
    assert off.abs().mean((2, 3, 4)).max() < 7


def test_the_store_keeps_the_geometry(tmp_path):
    """Ramps, which lose nothing: a crop shifted by a tenth of a pixel of the store would be off by 0.3 levels."""
    rows, columns = np.mgrid[:240, :400]
    ramps = np.stack([rows * 255 / 239, columns * 255 / 399, 255 - rows * 255 / 239], 2)
    for number in range(8):
        Image.fromarray(ramps.round().astype(np.uint8)).save(tmp_path / f"{number}.png")
    off = differences(tmp_path, 80, 40)
    assert off.mean((2, 3)).abs().max() < 0.3
    assert off.abs().max() <= 2


def test_a_second_start_decodes_nothing_and_opens_no_file(photos, tmp_path, decoded):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    source = open_source(str(folder))
    first = crops_of(source, open_resident(source, 48), 24)
    assert sorted(decoded) == list(range(16))
    again = open_source(str(folder))
    gc.collect()
    shutil.rmtree(folder)
    for (_, crops), (_, expected) in zip(crops_of(again, open_resident(again, 48), 24), first, strict=True):
        assert torch.equal(crops, expected)
    assert len(decoded) == 16


def test_another_size_and_other_files_are_decoded_anew(photos, tmp_path, decoded, resident_cache):
    source = open_source(str(photos))
    open_resident(source, 48)
    open_resident(source, 40)
    assert len(decoded) == 32
    shutil.copytree(photos, tmp_path / "photos")
    open_resident(open_source(str(tmp_path / "photos")), 40)
    assert len(decoded) == 32
    (tmp_path / "photos/class0/00.jpg").unlink()
    open_resident(open_source(str(tmp_path / "photos")), 40)
    assert len(decoded) == 32 + 15
    folders = [path.name for path in resident_cache.iterdir() if path.is_dir()]
    assert sorted(name.split("-")[1] for name in folders) == ["40px", "40px", "48px"]
    assert all(name.endswith("-on-cpu") and "-pil-" in name for name in folders)


def test_backends_over_the_same_images_hold_one_store(photos, decoded):
    source = open_source(str(photos))
    training, evaluation = open_resident(source, 48, 24), open_resident(open_source(str(photos)), 48, 32)
    other = open_resident(source, 40)
    assert training.store is evaluation.store is not other.store
    training.close()
    assert evaluation.store.images() is training.store.images()
    assert len(resident._stores) == 2
    del training, evaluation, other
    gc.collect()
    assert len(resident._stores) == 0


def test_evaluation_and_training_share_it(photos, decoded):
    source = open_source(str(photos))
    config = load_config("quickstart", [f"data.train={photos}", "data.backend=resident", "data.store_size=48",
                                        "train.batch_size=4", "data.workers=0"])  # fmt: skip
    training = build.build_loader(config, source)
    evaluation = build.build_evaluation_loader(config, source)
    assert isinstance(evaluation, EvaluationLoader)
    assert training.backend.store is evaluation.backend.store
    assert sum(len(batch.indices) for batch in evaluation.batches()) == len(decoded) == 16


def test_a_start_that_was_stopped_while_decoding_leaves_nothing_to_use(photos, decoded, monkeypatch, resident_cache):
    class Stop(BaseException):
        pass

    def stopped(self, requests):
        for number, found in enumerate(crops(self, requests)):
            if number == 1:
                raise Stop
            yield found

    crops = pil.PilBackend.crops
    monkeypatch.setattr(decoded_cache, "BATCH", 4)
    source = open_source(str(photos))
    with monkeypatch.context() as patch:
        patch.setattr(pil.PilBackend, "crops", stopped)
        with pytest.raises(Stop):
            open_resident(source, 48)
    assert [path.name for path in resident_cache.iterdir() if path.is_dir()] == []
    killed = next(resident_cache.glob("*.lock")).with_suffix(".partial")
    killed.mkdir()
    (killed / "images.npy").write_bytes(b"half")
    before = len(decoded)
    found = crops_of(source, open_resident(source, 48), 24)
    assert len(decoded) - before == 16
    assert [path.name.endswith(".partial") for path in resident_cache.iterdir() if path.is_dir()] == [False]
    assert all(crops.float().std() > 1 for _, crops in found)


def test_files_that_cannot_be_decoded_are_named_when_they_are_asked_for(photos, tmp_path, decoded):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    cut, junk = folder / "class2/10.jpg", folder / "class0/04.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    junk.write_bytes(b"no picture")
    for _ in range(2):
        source = open_source(str(folder))
        bad = sorted(index for index in range(16) if source.path(index) in (cut, junk))
        backend = open_resident(source, 48)
        said = []
        skip = SkipList(16, 0.2, report=lambda index, reason, count, said=said: said.append((index, reason)))
        made = loader_of(source, backend, skip=skip)
        # No box is drawn for an image without a size.
        with np.errstate(invalid="raise", divide="raise"):
            delivered = np.concatenate([batch.indices for batch in made.epoch(0)])
        assert len(delivered) == 16
        assert not np.isin(delivered, bad).any()
        assert sorted(index for index, _ in said) == bad
        assert all("cannot be decoded" in reason for _, reason in said)
        strict = loader_of(source, backend, batch_size=16, skip=SkipList(16, 0.0, np.arange(16) == bad[0]))
        with pytest.raises(UserError, match="class2/10.jpg cannot be decoded"):
            list(strict.epoch(0))
    # 15 have a header that can be read; each was tried once, but for those of the batch that was asked for again.
    assert set(decoded) == set(range(16)) - {bad[0]}


def test_what_does_not_fit_is_refused_with_the_size_that_would(photos, decoded, monkeypatch):
    """16 images x 3 bytes: 80 % of 100,000 free bytes are 40.8 pixels squared each."""
    source = open_source(str(photos))
    monkeypatch.setattr(resident, "free_bytes", lambda device: 100_000)
    with refuses("store-too-large", "data.store_size") as caught:
        open_resident(source, 41)
    assert {"16", "41", "8.07e-05", "8e-05", "data.store_size=40"} <= set(str(caught.value).replace(";", "").split())
    assert decoded == []
    held = open_resident(source, 40)
    # Not read yet, but it will be: 23,200 bytes are left.
    with refuses("store-too-large") as caught:
        open_resident(source, 20)
    assert "data.store_size=19" in str(caught.value)
    held.store.images()
    assert open_resident(source, 20)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 40)
    with refuses("store-too-large") as caught:
        open_resident(source, 13)
    assert "data.store_size=" not in str(caught.value)
    assert "data.backend=auto" in str(caught.value)


def test_a_store_that_nobody_can_reach_takes_no_room(photos, decoded, monkeypatch):
    source = open_source(str(photos))
    monkeypatch.setattr(resident, "free_bytes", lambda device: 100_000)
    run = [open_resident(source, 40)]
    run.append(run)
    del run
    assert open_resident(source, 20)


def test_a_store_in_a_cache_that_can_only_be_read_is_used(photos, decoded, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    open_resident(open_source(str(photos)), 48)
    source = open_source(str(photos))
    gc.collect()
    monkeypatch.setattr(decoded_cache, "FileLock", read_only)
    assert len(crops_of(source, open_resident(source, 48), 24)) == 4
    assert len(decoded) == 16


def test_a_store_outlives_the_verdicts_of_a_scan(photos, decoded):
    """What a scan found unwanted is decoded too, with or without a known size; what it found unreadable is not."""
    source = open_source(str(photos))
    source.look(np.array([5]))
    source.kinds[[5, 9]], source.kinds[12] = UNWANTED, UNREADABLE
    backend = open_resident(source, 48)
    assert source.kinds[[5, 9, 12]].tolist() == [UNWANTED, UNWANTED, UNREADABLE]
    assert list(backend.store.bad) == [12]
    del backend
    gc.collect()
    later = open_source(str(photos))
    later.kinds[12] = UNREADABLE
    backend = open_resident(later, 48)
    assert later.kinds[[5, 9]].tolist() == [PLAIN, PLAIN]
    assert (backend.store.images()[[5, 9]].float().std((1, 2, 3)) > 1).all()
    assert sorted(decoded) == [*range(12), 13, 14, 15]


def test_a_disk_without_room_is_one_sentence(photos, monkeypatch, resident_cache):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded_cache.os, "posix_fallocate", full)
    sentence = r"under .*resident, which cannot be written .*No space left.*XDG_CACHE_HOME"
    with pytest.raises(UserError, match=sentence):
        open_resident(open_source(str(photos)), 48)
    assert [path.suffix for path in resident_cache.iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(resident_cache.parents[1]))
    for module, function in ((decoded_cache.np, "savez"), (decoded_cache.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            with pytest.raises(UserError, match=sentence):
                open_resident(open_source(str(photos)), 48)
        assert [path.suffix for path in resident_cache.iterdir()] == [".lock"]
    resident_cache.parent.rename(resident_cache.parent.with_name("away"))
    resident_cache.parent.write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        open_resident(open_source(str(photos)), 48)


def test_the_first_lines_say_size_and_memory(photos, decoded):
    printed = []
    backend = open_backend("resident", open_source(str(photos)), (24,), 4, 0, CPU, 48, printed.append)
    assert backend.description == (
        f"resident (16 images of 48 px, 0.000111 GB of cpu memory; decoded by pil {pil.PIL.__version__} on cpu)"
    )
    assert printed[0].startswith("decoding  16 images once, to 48 px: 0.000111 GB of memory")
    assert printed[1].startswith("decoded   in ")


def test_a_run_computes_what_one_that_decodes_every_time_does(tiny, tmp_path):
    """The demo images are 48 px: DALI's crops of them and the store's come from the same pixels and the same code."""
    losses = []
    for backend in ("dali", "resident"):
        overrides = tiny(f"data.backend={backend}", "data.store_size=48", f"run.name={backend}", "train.max_steps=12")
        result = fastsiam.pretrain(load_config("quickstart", overrides))
        losses.append([line["loss"] for line in lines(tmp_path / "runs" / backend) if line["kind"] == "train"])
        losses[-1].append(result.knn_top1)
    assert len(losses[0]) == 13
    assert losses[0] == losses[1]
