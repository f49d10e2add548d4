"""Tar shards as others make them: names, labels, and members that are not images."""

import bz2
import gzip
import json
import os
import tarfile

import pytest

from fastsiam.data.sources import excluded
from fastsiam.data.sources.open import check_labels, open_source
from tests.support.refusals import refuses
from tests.support.tars import shard

WORDS = ("cat", "dog", "fox")


def opened(root, *members):
    """The images in shards of one tar file, by name, with the words of their labels."""
    shard(root / "s/0.tar", *members)
    source = open_source(str(root / "s"))
    names = [os.fsdecode(bytes(name)) for name in source.names]
    words = [source.classes[label] if label >= 0 else "" for label in source.labels]
    return source, dict(zip(names, words, strict=True))


@pytest.mark.parametrize(
    "names",
    [
        ["2024-05-01 12.30.00.jpg", "2024-05-01 12.30.01.jpg", "holiday.2019.07.JPG", "holiday.2019.08.png"],
        ["x.left.jpg", "x.right.jpg", "y.left.jpg", "y.right.jpg"],
        ["holiday.jpg", "holiday.2019.07.jpg", "folder.d/holiday.jpg", "IMG_1.jpg"],
        ["a.jpg", "a.png", "...jpg", ".a.jpg"],
    ],
)
def test_every_member_that_is_an_image_is_an_image(tmp_path, picture, names):
    source, found = opened(tmp_path, *((name, picture + bytes([number])) for number, name in enumerate(names)))
    assert list(found) == names
    assert [source.read(row)[-1] for row in range(len(names))] == [0, 1, 2, 3]
    assert source.excluded == {}


def test_a_field_of_an_image_and_what_systems_leave_are_not_images(tmp_path, picture):
    names = ["a.jpg", "a.seg.png", "a.depth_map.png", "__MACOSX/a.jpg", "x/._a.jpg", "notes.md", "b.jpg", "b.json"]
    source, found = opened(tmp_path, *((name, picture) for name in names), ("c.jpg.gz", b""), ("raw", picture))
    assert list(found) == ["a.jpg", "b.jpg", "raw"]
    assert source.excluded == {excluded.FIELDS: 2, excluded.SYSTEM: 2, ".md": 1, excluded.GZIPPED: 1}


def test_the_last_of_two_members_of_a_name_is_what_unpacking_gives(tmp_path, picture):
    source, found = opened(tmp_path, ("a.jpg", b"old"), ("b.jpg", picture), ("a.jpg", picture))
    assert list(found) == ["b.jpg", "a.jpg"]
    assert (source.read(1), source.excluded) == (picture, {excluded.REPLACED: 1})


def text_of(number):
    return json.dumps({"label": number, "class_name": WORDS[number], "width": 8})


LABELLED = {
    "a number": ("{i}.jpg", "{i}.cls", lambda label: str(label), ("0", "1", "2"), "by .cls"),
    "a word": ("{i}.jpg", "{i}.cls", lambda label: f"{WORDS[label]}\n", WORDS, "by .cls"),
    "words in json": ("{i}.jpg", "{i}.json", text_of, WORDS, "by class_name in .json"),
    "numbers in json": ("{i}.jpg", "{i}.json", lambda label: json.dumps({"Target": label}), ("0", "1", "2"), "target"),
    "a list of one": ("{i}.jpg", "{i}.json", lambda label: json.dumps({"label": [label]}), ("0", "1", "2"), "label in"),
    "only a number": ("{i}.jpg", "{i}.json", str, ("0", "1", "2"), "label in .json"),
    "a text": ("{i}.jpg", "{i}.txt", lambda label: f"{WORDS[label]}\n", WORDS, "by .txt"),
    "a date": ("2024-05-01 12.30.0{i}.jpg", "2024-05-01 12.30.0{i}.cls", lambda label: WORDS[label], WORDS, "by .cls"),
    "two of a key": ("{i}.left.jpg", "{i}.cls", lambda label: WORDS[label], WORDS, "by .cls"),
    "folders": ("./train/{c}/{i}.jpg", None, None, WORDS, "by folder"),
    "folders with images in them": ("{c}/images/{i}.jpg", None, None, WORDS, "by folder"),
}  # fmt: skip


@pytest.mark.parametrize("way", LABELLED)
def test_labels_are_read_from_what_lies_beside_an_image(tmp_path, picture, way):
    name, beside, text, classes, how = LABELLED[way]
    members = []
    for number in range(6):
        label = number % 3
        members.append((name.format(i=number, c=WORDS[label]), picture))
        if beside:
            members.insert(number % 2 - 1 or len(members), (beside.format(i=number), text(label).encode()))
    source, _ = opened(tmp_path, *members)
    assert (source.classes, source.labels.tolist()) == (classes, [0, 1, 2] * 2)
    assert how in source.labelling
    assert how in source.label_text()


@pytest.mark.parametrize(
    ("shards", "classes", "labels"),
    [
        (("cat/0.tar", "cat/1.tar", "dog/0.tar"), ("cat", "dog"), [0, 0, 1]),
        (("cat.tar", "dog.tar"), ("cat", "dog"), [0, 1]),
        (("cat-0001.tar", "cat-0002.tar", "dog-0001.tar"), ("cat", "dog"), [0, 0, 1]),
        (("n01440764.tar", "n01443537.tar"), ("n01440764", "n01443537"), [0, 1]),
        (("shard-00000.tar", "shard-00001.tar"), (), [-1, -1]),
        (("train.tar", "extra.tar"), (), [-1, -1]),
    ],
)
def test_shards_of_a_class_each_are_labels(tmp_path, picture, shards, classes, labels):
    for name in shards:
        shard(tmp_path / "s" / name, ("0.jpg", picture))
    source = open_source(str(tmp_path / "s"))
    assert (source.classes, source.labels.tolist()) == (classes, labels)
    assert [source.read(row) for row in range(len(shards))] == [picture] * len(shards)


def test_foreign_shards_are_read_in_order_with_their_labels(tmp_path, picture):
    shard(tmp_path / "s/1.tar", ("./", b"", {"type": tarfile.DIRTYPE}), ("./c.jpg", picture), ("./c.cls", b"0\n"))
    members = [("b.cls", b"2"), ("b.JPEG", picture), ("b.json", b"{}"), ("a.seg.png", b"mask"), ("a.png", picture)]
    source, _ = opened(tmp_path, *members, ("a.cls", b"1"))
    assert [os.fsdecode(name) for name in source.names] == ["b.JPEG", "a.png", "./c.jpg"]
    assert (source.labels.tolist(), source.classes) == ([2, 1, 0], ("0", "1", "2"))
    assert [source.read(row) for row in range(3)] == [picture] * 3
    assert source.name(0) == f"{tmp_path}/s/0.tar/b.JPEG"


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([("a.jpg", b"x"), ("a.cls", b"\0\1\2")], r"0.tar holds a.cls with b'\x00\x01\x02'"),
        ([("a.jpg", b"x"), ("a.json", b'{"caption": "a cat"}')], "no label, class, class_name, target or category"),
        ([("a.jpg", b"x"), ("a.CLS", b" ")], "0.tar holds a.CLS with b' '"),
        ([("a.jpg", b"x"), ("a.cls", b"x" * 5000)], "0.tar holds a.cls of 5,000 bytes"),
        ([("a.jpg", b"x"), ("a.label", b"3")], "its .label members are not read for labels"),
        ([("a.jpg", b"x"), ("a.txt", b"a cat"), ("b.jpg", b"x"), ("b.txt", b"a dog")], ""),
    ],
)
def test_labels_that_cannot_be_read_leave_none_and_a_reason(tmp_path, members, text):
    source, _ = opened(tmp_path, *members)
    assert (source.classes, set(source.labels.tolist())) == ((), {-1})
    assert text in source.labelling


def test_shards_without_labels_are_refused_for_knn(tmp_path, picture):
    source, _ = opened(tmp_path, ("a.jpg", picture))
    with refuses("no-labels", "data.train") as error:
        check_labels(source, source)
    assert "KEY.cls" in str(error.value)


def test_an_image_without_a_label_among_others_is_counted(tmp_path, picture):
    source, found = opened(tmp_path, ("a.jpg", picture), ("a.cls", b"3"), ("b.jpg", picture), ("c.jpg", picture))
    assert found == {"a.jpg": "3", "b.jpg": "", "c.jpg": ""}
    assert "2 images have none" in source.label_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "a.jpg"},
        {"type": tarfile.CHRTYPE},
    ],
)
def test_members_that_are_not_plain_files_are_counted(tmp_path, picture, fields):
    source, found = opened(tmp_path, ("a.jpg", picture), ("b.jpg", b"", fields))
    assert (list(found), source.excluded) == (["a.jpg"], {excluded.NOT_PLAIN: 1})


def test_one_shard_can_be_named_by_itself(tmp_path, picture):
    for number in range(2):
        path = shard(tmp_path / f"s/{number}.tar", (f"{number}.jpg", picture), (f"{number}.cls", b"dog"))
    source = open_source(str(path))
    assert (source.names.tolist(), source.classes, source.read(0)) == ([b"1.jpg"], ("dog",), picture)
    (tmp_path / "s/2.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with refuses("compressed-shards", "data.train"):
        open_source(str(tmp_path / "s/2.tar.gz"))


def test_shards_without_images_are_refused(tmp_path):
    with refuses("no-images", "data.train"):
        opened(tmp_path, ("a.md", b"x"))


@pytest.mark.parametrize("name", ["/b.jpg", "../b.jpg", "x/../b.jpg"])
def test_members_that_lead_outside_are_refused(tmp_path, picture, name):
    with refuses("leads-outside", "data.train"):
        opened(tmp_path, ("a.jpg", picture), (name, b"x"))


@pytest.mark.parametrize("keep", [0, 200, 700, 1536, 2048])
def test_a_foreign_shard_that_was_cut_off_is_refused(tmp_path, keep):
    path = shard(tmp_path / "shards/0.tar", ("a.jpg", b"x" * 512), ("b.jpg", b"y" * 512))
    os.truncate(path, keep)
    with refuses("damaged-shard", "data.train"):
        open_source(str(tmp_path / "shards"))


def test_joined_tar_files_are_read_to_the_last(tmp_path, picture):
    parts = [shard(tmp_path / f"{name}.tar", (f"{name}.jpg", picture + name.encode())).read_bytes() for name in "abc"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/0.tar").write_bytes(b"".join(parts))
    source = open_source(str(tmp_path / "s"))
    assert source.names.tolist() == [b"a.jpg", b"b.jpg", b"c.jpg"]
    assert [source.read(row)[-1:] for row in range(3)] == [b"a", b"b", b"c"]
    (tmp_path / "s/0.tar").write_bytes(parts[0] + b"no header" * 100)
    assert open_source(str(tmp_path / "s")).names.tolist() == [b"a.jpg"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_bytes_that_are_not_utf_8(tmp_path, picture, form):
    names = ["x" * 180 + "/" + "y" * 90 + ".jpg", os.fsdecode("Möwe.jpg".encode("cp437")), "猫.jpg"]
    shard(tmp_path / "s/0.tar", *((name, picture) for name in names), format=form)
    source = open_source(str(tmp_path / "s"))
    assert source.names.tolist() == [os.fsencode(name) for name in names]
    assert source.read(1) == picture


@pytest.mark.parametrize("beside", ["cover.jpg", "previews/cover.jpg"])
@pytest.mark.parametrize("place", ["s/0.tar", "s/shards/0.TAR"])
def test_a_stray_picture_does_not_hide_the_shards_beside_it(tmp_path, picture, place, beside):
    shard(tmp_path / place, *((f"{number}.jpg", picture) for number in range(5)))
    (tmp_path / "s" / beside).parent.mkdir(exist_ok=True)
    (tmp_path / "s" / beside).write_bytes(picture)
    source = open_source(str(tmp_path / "s"), max_bad_fraction=0)
    assert (len(source), source.excluded) == (5, {excluded.BESIDE: 1})
    assert source.read(0) == picture


@pytest.mark.parametrize("holds", ["the images beside it", "no image", "nothing: a dead link"])
def test_a_tar_file_beside_the_images_that_are_meant_is_excluded(tmp_path, picture, holds):
    (tmp_path / "s").mkdir()
    for number in range(5):
        (tmp_path / f"s/{number}.jpg").write_bytes(picture)
    members = {
        "the images beside it": [(f"{number}.jpg", picture) for number in range(5)],
        "no image": [("a.npy", b"")],
    }
    if holds in members:
        shard(tmp_path / "s/backup.tar", *members[holds])
        # Heavy enough to be looked into.
        with open(tmp_path / "s/backup.tar", "ab") as file:
            file.write(bytes(1 << 16))
    else:
        (tmp_path / "s/backup.tar").symlink_to("nowhere")
    source = open_source(str(tmp_path / "s"))
    assert (source.packed, len(source), source.excluded) == (None, 5, {".tar": 1})


@pytest.mark.parametrize(
    ("end", "pack"), [(".tar.gz", gzip.compress), (".tgz", gzip.compress), (".tar.bz2", bz2.compress)]
)
def test_compressed_shards_are_refused_with_what_to_type_and_counted_beside_plain_ones(tmp_path, picture, end, pack):
    plain = shard(tmp_path / "s/1.tar", ("a.jpg", picture))
    (tmp_path / f"s/0{end}").write_bytes(pack(plain.read_bytes()))
    source = open_source(str(tmp_path / "s"))
    assert (source.names.tolist(), source.excluded) == ([b"a.jpg"], {excluded.COMPRESSED: 1})
    plain.unlink()
    with refuses("compressed-shards", "data.train"):
        open_source(str(tmp_path / "s"))
