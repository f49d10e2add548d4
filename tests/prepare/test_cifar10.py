"""CIFAR-10 from the authors' archive, byte for byte in their format, and from images."""

import io
import os
import pickle
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastsiam.config import load_config
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.prepare import cifar10
from fastsiam.prepare.__main__ import main

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def text(value: str) -> bytes:
    """A str as Python 2 pickled it in protocol 2: SHORT_BINSTRING."""
    return b"U" + bytes([len(value)]) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def array(values: np.ndarray) -> bytes:
    """uint8 [n, m] as numpy under Python 2 pickled it."""
    head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text("b") + b"\x87R"
    kind = b"cnumpy\ndtype\n" + text("u1") + number(0) + number(1) + b"\x87R"
    kind += b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(values.shape[0]) + number(values.shape[1]) + b"\x86"
    data = b"T" + struct.pack("<i", values.size) + values.tobytes()
    return head + b"(" + number(1) + shape + kind + b"\x89" + data + b"tb"


def items(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def pickled(fields: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in fields.items()) + b"u."


def batch(images: np.ndarray, labels: list[int]) -> bytes:
    """`images`: uint8 [n, 32, 32, 3]."""
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    fields = {"batch_label": text("one of 5"), "labels": items([number(label) for label in labels])}
    return pickled(fields | {"data": array(flat), "filenames": items([text(f"{i}.png") for i in labels])})


@pytest.fixture(scope="module")
def batches():
    """Name of a file in the archive to its images [20, 32, 32, 3] and labels."""
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (20, 32, 32, 3), np.uint8), generator.permutation(20) % 10) for name in FILES
    }


@pytest.fixture
def extracted(batches, tmp_path):
    folder = tmp_path / "extracted" / cifar10.FOLDER
    folder.mkdir(parents=True)
    for name, (images, labels) in batches.items():
        (folder / name).write_bytes(batch(images, labels.tolist()))
    meta = {"num_cases_per_batch": number(20), "label_names": items([text(name) for name in CLASSES])}
    (folder / "batches.meta").write_bytes(pickled(meta))
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


def test_the_archive_gives_its_pixels_and_labels(archive, batches, tmp_path, capsys):
    assert main(["cifar10", str(archive), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "out holds 100 images in train and 20 in val" in printed.out
    assert printed.err.startswith(f"warning: {archive} is not the archive that its authors publish (md5 ")
    check(tmp_path / "out", batches)
    defaults = load_config("r18_cifar10_800ep").data
    assert (defaults.train, defaults.val) == ("data/cifar10/train", "data/cifar10/val")


def test_so_does_its_folder_and_the_folder_above(extracted, batches, tmp_path, capsys):
    for number, source in enumerate((extracted, extracted.parent)):
        assert main(["cifar10", str(source), str(tmp_path / f"out{number}")]) == 0
        check(tmp_path / f"out{number}", batches)
    assert capsys.readouterr().err == ""


def test_batches_pickled_by_python_3_are_read_too():
    images = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for protocol in (2, 3):
        found = cifar10.load_batch(pickle.dumps({b"data": images, b"labels": [1, 2]}, protocol), "x")
        assert (found["data"] == images).all()
        assert found["labels"] == [1, 2]


class Attack:
    def __reduce__(self):
        return os.system, ("touch proof",)


@pytest.mark.parametrize("value", [Attack(), subprocess.Popen, io.BytesIO(), pickle.loads])
def test_a_batch_that_names_code_is_refused_and_not_run(value, extracted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (extracted / "data_batch_3").write_bytes(pickle.dumps({"data": value}, 2))
    assert main(["cifar10", str(extracted), "out"]) == 2
    assert "data_batch_3 is no batch of CIFAR-10 (it asks for " in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((20, 3072), object),
        np.zeros((20, 3072), np.float32),
        np.zeros((20, 3072), [("a", np.uint8)]),
        np.dtype("O"),
    ],
)
def test_arrays_that_are_not_uint8_are_refused_before_they_are_made(values):
    with pytest.raises(UserError, match="is no batch of CIFAR-10 .it asks for the dtype"):
        cifar10.load_batch(pickle.dumps({"data": values}, 2), "x")


def test_a_pickle_cannot_call_numpy_or_name_a_codec_that_is_not_there():
    # ndarray((2,), "O"), a dtype u1 with fields, and codecs.encode("x", "nope").
    fields = b"cnumpy\ndtype\n" + text("u1") + number(0) + number(1) + b"\x87R"
    fields += b"(" + number(3) + text("|") + b"N" + items([]) + b"N" + number(-1) + number(-1) + number(63) + b"tb"
    for value, expected in (
        (b"cnumpy\nndarray\n" + number(2) + b"\x85" + text("O") + b"\x86R", "not callable"),
        (fields, "a dtype of several parts"),
        (b"c_codecs\nencode\nX\1\0\0\0xX\4\0\0\0nope\x86R", "unknown encoding"),
    ):
        with pytest.raises(UserError, match=expected):
            cifar10.load_batch(pickled({"data": value}), "x")


@pytest.mark.parametrize("label", ["../../x", "/x", ".", "..", "", "a/b", "a\0b"])
def test_a_class_that_names_no_folder_of_its_own_is_refused(label, extracted, tmp_path):
    names = items([text(name) for name in (*CLASSES[:9], label)])
    (extracted / "batches.meta").write_bytes(pickled({"label_names": names}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="batches.meta names the class .*, which cannot name a folder"):
        cifar10.convert(extracted, tmp_path / "deep", pytest.fail)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tar_member_with_a_nul_is_refused(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("x.jpg")
        info.pax_headers = {"path": "train/c\0t/x.jpg"}
        tar.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match="which cannot name a file"):
        cifar10.convert(tmp_path / "bad.tar", tmp_path / "out", pytest.fail)


def test_names_and_labels_of_other_types_are_refused(extracted, tmp_path):
    names = pickle.dumps({"label_names": list(CLASSES)}, 2)
    for meta in ({}, {"label_names": "cat"}, {"label_names": [1]}, {"label_names": np.zeros(10, np.uint8)}):
        (extracted / "batches.meta").write_bytes(pickle.dumps(meta, 2))
        with pytest.raises(UserError, match="batches.meta is no batches.meta of CIFAR-10"):
            cifar10.convert(extracted, tmp_path / "out", pytest.fail)
    (extracted / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "cat"]}, 2))
    with pytest.raises(UserError, match="names a class twice"):
        cifar10.convert(extracted, tmp_path / "out", pytest.fail)
    (extracted / "batches.meta").write_bytes(names)
    images = np.zeros((2, 3072), np.uint8)
    for labels in ([0, 1.0], [0, True], [0, "1"]):
        (extracted / "test_batch").write_bytes(pickle.dumps({"data": images, "labels": labels}, 2))
        with pytest.raises(UserError, match="test_batch has labels outside 0 to 9"):
            cifar10.convert(extracted, tmp_path / "out", pytest.fail)


def test_damage_is_told_in_one_sentence(extracted, archive, tmp_path):
    out = tmp_path / "out"
    images = np.zeros((3, 32, 32, 3), np.uint8)
    whole = (extracted / "test_batch").read_bytes()
    for data, expected in (
        (whole[:300], "test_batch is no batch"),
        (batch(images, [1, 2]), "n labels"),
        (batch(images, [1, 2, 10]), "test_batch has labels outside 0 to 9"),
        (batch(images[:, :16], [1, 2, 3]), r"data uint8 \[n, 3072\]"),
        (b"", "test_batch is no batch"),
    ):
        (extracted / "test_batch").write_bytes(data)
        with pytest.raises(UserError, match=expected):
            cifar10.convert(extracted, out, pytest.fail)
    (extracted / "test_batch").unlink()
    with pytest.raises(UserError, match="is not whole"):
        cifar10.convert(extracted, out, pytest.fail)
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(UserError, match="is no whole tar archive|is not whole"):
        cifar10.convert(archive, out, lambda sentence: None)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk is no whole tar archive .*; expected cifar-10-python.tar.gz"):
        cifar10.convert(tmp_path / "junk", out, pytest.fail)
    with pytest.raises(UserError, match="there is no "):
        cifar10.convert(tmp_path / "absent", out, pytest.fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == [cifar10.ARCHIVE, "extracted", "junk"]


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
    counts = cifar10.convert(source, tmp_path / "new/out", pytest.fail)
    assert counts == {"train": 6, "val": 6}
    out = tmp_path / "new/out"
    assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == written


def test_images_that_are_no_two_parts_of_the_same_classes_are_refused(tmp_path):
    pictures(tmp_path / "half", parts=("train",))
    with pytest.raises(UserError, match="has no test images"):
        cifar10.convert(tmp_path / "half", tmp_path / "out", pytest.fail)
    pictures(tmp_path / "odd")
    (tmp_path / "odd/test/dog").rename(tmp_path / "odd/test/wolf")
    with pytest.raises(UserError, match="the classes of train and test differ"):
        cifar10.convert(tmp_path / "odd", tmp_path / "out", pytest.fail)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="odd exists; name a new folder"):
        cifar10.convert(tmp_path / "half", tmp_path / "odd", pytest.fail)


def test_two_images_of_one_name_are_refused(tmp_path):
    pictures(tmp_path / "in", parts=("train", "test"))
    (tmp_path / "in/val/cat").mkdir(parents=True)
    shutil.copy(tmp_path / "in/test/cat/0001.jpg", tmp_path / "in/val/cat")
    with pytest.raises(UserError, match="two images for val/cat/0001.jpg .*; rename or leave out one"):
        cifar10.convert(tmp_path / "in", tmp_path / "out", pytest.fail)
    assert not (tmp_path / "out").exists()


def test_a_tar_that_leads_outside_is_refused(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("train/cat/../../../x.jpg")
        tar.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match="a path that leads out of the archive"):
        cifar10.convert(tmp_path / "bad.tar", tmp_path / "out", pytest.fail)


def test_without_a_source_torchvision_downloads_or_says_why_not(tmp_path, monkeypatch, capsys, extracted, batches):
    import torchvision.datasets

    def fetch(root, download):
        assert download
        (root / cifar10.FOLDER).symlink_to(extracted)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    assert main(["cifar10", str(tmp_path / "out")]) == 0
    check(tmp_path / "out", batches)

    def no_network(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert main(["cifar10", str(tmp_path / "other")]) == 2
    expected = "cannot be downloaded (no route to host); fetch cifar-10-python.tar.gz elsewhere and give its path"
    assert expected in capsys.readouterr().err
