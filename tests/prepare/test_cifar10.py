"""CIFAR-10 from the authors' archive and from images."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from fastsiam.config import load_config
from fastsiam.data.sources.open import open_source
from fastsiam.prepare import cifar10
from fastsiam.prepare.__main__ import main
from tests.support.refusals import refused, refuses

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@pytest.fixture(scope="module")
def batches():
    """Images [20, 32, 32, 3] and labels by the name of a file in the archive."""
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (20, 32, 32, 3), np.uint8), generator.permutation(20) % 10) for name in FILES
    }


@pytest.fixture
def extracted(batches, tmp_path, monkeypatch):
    """The archive's folder, with few images; torchvision takes their MD5 for the published ones."""
    folder = tmp_path / "extracted" / cifar10.FOLDER
    folder.mkdir(parents=True)
    sums = {}
    contents = {"batches.meta": {"label_names": list(CLASSES)}}
    for name, (images, labels) in batches.items():
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        contents[name] = {"data": flat, "labels": labels.tolist()}
    for name, fields in contents.items():
        data = pickle.dumps(fields, 2)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [[name, sums[name]] for name in FILES[:5]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [[name, sums[name]] for name in FILES[5:]])
    meta = torchvision.datasets.CIFAR10.meta | {"md5": sums["batches.meta"]}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return folder


@pytest.fixture
def archive(extracted, tmp_path):
    path = tmp_path / cifar10.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(extracted, cifar10.FOLDER)
    return path


def check(out, batches):
    for part, names in (("train", FILES[:5]), ("val", FILES[5:])):
        images = np.concatenate([batches[name][0] for name in names])
        labels = np.concatenate([batches[name][1] for name in names])
        source = open_source(str(out / part))
        assert source.classes == CLASSES
        assert len(source) == len(images) == 20 * len(names)
        for index in range(len(source)):
            place = int(source.path(index).stem)
            assert source.labels[index] == labels[place]
            assert (np.asarray(Image.open(source.path(index))) == images[place]).all()


def test_the_archive_its_folder_and_the_folder_above_give_pixels_and_labels(archive, extracted, batches, tmp_path):
    for number, source in enumerate((archive, extracted, extracted.parent)):
        assert main(["cifar10", str(source), str(tmp_path / f"out{number}")]) == 0
        check(tmp_path / f"out{number}", batches)
    data = load_config("r18_cifar10_800ep").data
    assert (data.train, data.val) == ("data/cifar10/train", "data/cifar10/val")


class Attack:
    def __reduce__(self):
        return os.system, ("touch proof",)


def test_files_that_are_not_the_authors_are_refused_before_they_are_unpickled(extracted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data_batch_3", "batches.meta"):
        before = (extracted / name).read_bytes()
        (extracted / name).write_bytes(pickle.dumps({"data": Attack()}, 2))
        assert refused("prepare", "cifar10", extracted, "out").code == "damaged"
        (extracted / name).write_bytes(before)
    (extracted / "test_batch").unlink()
    assert refused("prepare", "cifar10", extracted, "out").code == "damaged"
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "out").exists()


def test_damaged_and_absent_archives_are_refused(archive, tmp_path):
    out = tmp_path / "out"
    os.truncate(archive, archive.stat().st_size // 2)
    (tmp_path / "junk").write_bytes(b"junk")
    for name, code in ((archive.name, "damaged"), ("junk", "damaged"), ("absent", "absent")):
        with refuses(code, "SRC"):
            cifar10.convert(tmp_path / name, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [cifar10.ARCHIVE, "extracted", "junk"]


@pytest.mark.parametrize(
    ("name", "headers", "code"),
    [("x.jpg", {"path": "train/c\0t/x.jpg"}, "bad-name"), ("train/cat/../../../x.jpg", {}, "leads-outside")],
)
def test_members_that_cannot_be_files_below_out_are_refused(tmp_path, name, headers, code):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.pax_headers = headers
        tar.addfile(info, io.BytesIO())
    with refuses(code, "SRC"):
        cifar10.convert(tmp_path / "bad.tar", tmp_path / "out")


def pictures(root, parts=("train", "test")):
    """A folder of images; name below the root to bytes."""
    written = {}
    generator = np.random.default_rng(1)
    for part in parts:
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                path = root / part / name / f"{number:04d}.jpg"
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
                written[f"{part}/{name}/{path.name}".replace("test/", "val/")] = path.read_bytes()
    (root / "readme.txt").write_text("x")
    return written


@pytest.mark.parametrize("form", ["folder", "tar.xz", "tar"])
def test_images_keep_their_bytes_and_test_becomes_val(tmp_path, form):
    written = pictures(tmp_path / "in")
    source = tmp_path / "in"
    if form != "folder":
        source = tmp_path / f"images.{form}"
        with tarfile.open(source, "w:xz" if form == "tar.xz" else "w") as tar:
            tar.add(tmp_path / "in", ".")
    out = tmp_path / "new/out"
    assert cifar10.convert(source, out) == {"train": 6, "val": 6}
    assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == written


def test_images_that_are_not_two_parts_of_the_same_classes_are_refused(tmp_path):
    pictures(tmp_path / "half", parts=("train",))
    pictures(tmp_path / "odd")
    (tmp_path / "odd/test/dog").rename(tmp_path / "odd/test/wolf")
    pictures(tmp_path / "twice")
    (tmp_path / "twice/val/cat").mkdir(parents=True)
    shutil.copy(tmp_path / "twice/test/cat/0001.jpg", tmp_path / "twice/val/cat")
    for name, code in (("half", "no-images"), ("odd", "classes-differ"), ("twice", "same-name")):
        with refuses(code, "SRC"):
            cifar10.convert(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with refuses("exists", "OUT"):
        cifar10.convert(tmp_path / "half", tmp_path / "odd")


def test_without_a_source_torchvision_downloads_or_its_error_is_named(tmp_path, monkeypatch, extracted, batches):
    archive = torchvision.datasets.CIFAR10

    def fetch(self):
        shutil.copytree(extracted, self.root / cifar10.FOLDER)

    monkeypatch.setattr(archive, "download", fetch)
    assert main(["cifar10", str(tmp_path / "out")]) == 0
    check(tmp_path / "out", batches)

    def no_network(self):
        raise OSError("no route to host")

    monkeypatch.setattr(archive, "download", no_network)
    assert refused("prepare", "cifar10", tmp_path / "other").code == "no-download"
