"""One contract, every backend: what is delivered, in which order, how often, and which pixels."""

import dataclasses
import os
import shutil
import signal
from collections import deque

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.config.views import ViewGroup
from fastsiam.data import decode, rng
from fastsiam.data.backends import choose
from fastsiam.data.backends.base import LoaderError
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.backends.synthetic import SyntheticLoader
from fastsiam.data.loader import EvaluationLoader
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from tests.support.loaders import CPU, SIZE, SPEC, STORE, crops_of, make, source_of

BACKENDS = ("dali", "pil", "ffcv", "resident")
pytestmark = pytest.mark.usefixtures("resident_cache")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epoch_holds_every_batch_once_in_our_order(photos, backend, dtype):
    made = make(photos, backend, dtype=dtype)
    for epoch in (0, 1, 0):
        batches = list(made.epoch(epoch))
        assert len(batches) == made.steps_per_epoch == 3
        order = rng.epoch_order(0, epoch, 16)[:15]
        assert np.concatenate([batch.indices for batch in batches]).tolist() == order.tolist()
        for batch in batches:
            assert batch.views[0].shape == (10, 3, SIZE, SIZE)
            assert batch.views[0].dtype == dtype
            assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
            assert batch.labels.tolist() == made.source.labels[batch.indices].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_the_augmented_crops_of_their_images(photos, backend):
    plain = dataclasses.replace(SPEC, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    made = make(photos, backend, spec=plain)
    crops = crops_of(make(photos, backend, spec=plain))
    views = torch.cat([batch.views[0] for batch in made.epoch(0)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.mean, plain.std))
    expected = (crops.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(views, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["dali", "pil"])
def test_an_image_of_another_size_than_its_header_said_is_named(photos, backend):
    made = make(photos, backend, batch_size=16)
    made.source.image_sizes[:] = made.source.sizes(np.arange(16))
    made.source.image_sizes[6] += 1
    with pytest.raises(UserError, match=r"decodes to \[.*\] pixels \(height, width\), but its header says"):
        list(made.epoch(0))


def test_pil_crops_as_torchvision_does(photos):
    made = make(photos, "pil")
    request = next(made._requests(0, 0, deque()))
    crops = crops_of(made)[:10].view(2, 5, SIZE, SIZE, 3)
    for view in range(2):
        for row, index in enumerate(request.indices):
            top, left, height, width = request.boxes[0][view, row].tolist()
            image = decode.decode(made.source.path(index)).crop((left, top, left + width, top + height))
            expected = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            assert (crops[view, row].numpy() == expected).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_resuming_at_a_cursor_gives_the_rest_of_the_epoch(photos, backend):
    made = make(photos, backend)
    whole = list(made.epoch(1))
    for batch, again in zip(whole[1:], made.epoch(1, cursor=5), strict=True):
        assert torch.equal(batch.views[0], again.views[0])
    with pytest.raises(ValueError, match="cursor 3 is not at a batch of 5"):
        next(made.epoch(1, cursor=3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_an_epoch_early_does_not_disturb_the_next(photos, backend):
    made = make(photos, backend)
    second = [batch.views[0] for batch in made.epoch(1)]
    leaving = made.epoch(0)
    next(leaving)
    leaving.close()
    assert all(torch.equal(a, b.views[0]) for a, b in zip(second, made.epoch(1), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_differ_between_each_other_and_between_epochs_and_repeat_by_seed(photos, backend):
    first = next(make(photos, backend).epoch(0)).views[0]
    assert torch.equal(first, next(make(photos, backend).epoch(0)).views[0])
    one, two = first.chunk(2)
    assert (one - two).abs().mean() > 0.1
    assert (first - next(make(photos, backend).epoch(1)).views[0]).abs().mean() > 0.1
    assert (first - next(make(photos, backend, seed=1).epoch(0)).views[0]).abs().mean() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_share_an_epoch_without_overlap_and_agree_with_one_process(photos, backend):
    whole = list(make(photos, backend, batch_size=4).epoch(2))
    ranks = [list(make(photos, backend, batch_size=4, rank=rank, world_size=2).epoch(2)) for rank in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert batch.indices.tolist() == [*parts[0].indices, *parts[1].indices]
        views = torch.cat([torch.cat([part.views[0].chunk(2)[view] for part in parts]) for view in range(2)])
        assert torch.equal(batch.views[0], views)
    with pytest.raises(UserError, match="5 does not divide by 2 ranks"):
        make(photos, backend, world_size=2)


@pytest.mark.parametrize(("backend", "workers"), [("dali", 3), ("pil", 2), ("ffcv", 3)])
def test_the_number_of_workers_changes_nothing(photos, backend, workers):
    made = make(photos, backend, workers=workers)
    expected = [batch.views[0] for batch in make(photos, backend).epoch(0)]
    for _ in range(2):
        assert all(torch.equal(a, b.views[0]) for a, b in zip(expected, made.epoch(0), strict=True))
    made.backend.close()


# A .beton is written without them.
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "ffcv"])
@pytest.mark.parametrize("content", [b"no picture", b"", None], ids=["junk", "empty", "truncated"])
def test_a_file_that_cannot_be_decoded_is_named(photos, tmp_path, backend, content):
    shutil.copytree(photos, tmp_path / "photos")
    bad = tmp_path / "photos/class2/10.jpg"
    data = bad.read_bytes()
    bad.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(UserError, match="class2/10.jpg cannot be decoded"):
        list(make(tmp_path / "photos", backend, batch_size=16).epoch(0))


class Skipping:
    """A backend that leaves out its second batch, as iterators reset in the wrong place do."""

    description = "skipping"

    def __init__(self, inner, swap):
        self._inner, self._swap = inner, swap

    def crops(self, requests):
        for number, (indices, crops) in enumerate(self._inner.crops(requests)):
            if number != 1:
                yield indices, crops
            elif self._swap:
                yield indices[::-1], crops


def test_a_loader_that_skips_is_stopped_with_numbers(photos):
    asked = r"asked for \[10\] crops of the images"
    for batch_size, swap, told in ((5, False, asked), (5, True, asked), (8, False, "expected 16 images, .* 8$")):
        made = make(photos, "pil", batch_size=batch_size)
        made.backend = Skipping(made.backend, swap)
        with pytest.raises(LoaderError, match=told):
            list(made.epoch(0))


def test_a_batch_larger_than_the_data_is_refused_with_advice(photos):
    with pytest.raises(UserError, match=r"32 is more than the 16 images .* set train.batch_size=16 or less"):
        make(photos, "pil", batch_size=32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_gives_each_image_once_in_order_centred_and_plain(photos, backend):
    source, originals = source_of(photos, backend), open_source(str(photos))
    opened = open_backend(backend, source, (SIZE,), 6, 0 if backend == "pil" else 1, CPU, STORE)
    made = EvaluationLoader(source, SPEC, opened, batch_size=6, crop_ratio=0.875, dtype=torch.float32)
    for _ in range(2):
        batches = list(made.batches())
        assert [len(batch.indices) for batch in batches] == [6, 6, 4]
        assert torch.cat([batch.labels for batch in batches]).tolist() == source.labels.tolist()
    subset = np.array([3, 9, 14])
    views = torch.cat([batch.images for batch in made.batches(subset)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (SPEC.mean, SPEC.std))
    for row, index in enumerate(subset):
        image = decode.decode(originals.path(index))
        side = round(0.875 * min(image.size))
        left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        assert (views[row] - expected).abs().mean() < 1.0 / 255 / min(SPEC.std)


def test_synthetic_is_one_fixed_batch_for_an_epoch_of_imagenet():
    numbers = {"seed": 0, "device": CPU, "dtype": torch.bfloat16}
    assert SyntheticLoader((ViewGroup(2, SPEC),), batch_size=1000, **numbers).steps_per_epoch == 1281
    small = SyntheticLoader((ViewGroup(2, SPEC),), batch_size=4, num_images=11, **numbers)
    batches = list(small.epoch(0))
    assert len(batches) == 2
    assert batches[0].views[0].data_ptr() == batches[1].views[0].data_ptr()
    assert batches[0].views[0].shape == (8, 3, SIZE, SIZE)
    assert batches[0].views[0].is_contiguous(memory_format=torch.channels_last)
    assert abs(batches[0].views[0].float().std() - 1) < 0.05
    assert len(list(small.epoch(0, cursor=4))) == 1


def test_auto_takes_dali_where_it_is_installed_and_says_what_else_it_took(monkeypatch):
    assert choose.choose_backend("auto") == ("dali", "auto: DALI is installed")
    monkeypatch.setattr(choose, "dali_installed", lambda: False)
    name, reason = choose.choose_backend("auto")
    assert name == "pil"
    assert "nvidia-dali-cuda120" in reason
    with pytest.raises(ImportError, match="nvidia-dali-cuda120"):
        choose.choose_backend("dali")


def test_decoding_processes_outlive_the_signals_of_their_group(photos):
    """With one image a batch they are still at work when the signals come, each having begun."""
    made = make(photos, "pil", batch_size=1, workers=2)
    batches = made.epoch(0)
    delivered = [next(batches).indices for _ in range(2)]
    workers = [worker.pid for worker in made.backend._loader._iterator._workers]
    with open(f"/proc/{workers[0]}/stat", encoding="ascii") as file:
        server = int(file.read().rpartition(")")[2].split()[1])
    for pid in (server, *workers):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(pid, number)
    delivered += [batch.indices for batch in batches]
    assert np.concatenate(delivered).tolist() == rng.epoch_order(0, 0, 16).tolist()
    made.backend.close()
