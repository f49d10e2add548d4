"""Tar shards hold the same images as the folder: bytes, names, labels, order, views."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch

from fastsiam.data.sources.image_header import UNKNOWN, UNWANTED
from fastsiam.data.sources.index_cache import PACK_INCOMPLETE, PACK_INDEX
from fastsiam.data.sources.open import open_source
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.prepare import pack
from fastsiam.prepare.__main__ import main
from tests.support.loaders import make
from tests.support.refusals import refused, refuses
from tests.support.tars import shard


@pytest.fixture
def packed(photos, tmp_path):
    assert pack.pack(open_source(str(photos)), tmp_path / "packed", 40_000) > 2
    return tmp_path / "packed"


def test_a_pack_holds_what_the_folder_holds(photos, packed):
    folder, source = open_source(str(photos)), open_source(str(packed))
    assert source.names.tolist() == folder.names.tolist()
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.classes == folder.classes
    assert source.fingerprint() == folder.fingerprint()
    assert [source.read(row) for row in range(16)] == [folder.read(row) for row in range(16)]
    everything = np.arange(16)
    assert (source.kinds != UNKNOWN).all()
    assert source.image_sizes.tolist() == folder.sizes(everything).tolist()
    assert source.kinds.tolist() == folder.kinds.tolist()
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert path.stat().st_size < 40_000 + 2 * tarfile.RECORDSIZE or len(tar.getnames()) == 2


def test_others_read_the_shards(photos, packed):
    folder = open_source(str(photos))
    found = []
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert label.name == os.path.splitext(image.name)[0] + ".cls"
                found.append((image.name, tar.extractfile(image).read(), int(tar.extractfile(label).read())))
    expected = [(os.fsdecode(folder.names[row]), folder.read(row), folder.labels[row]) for row in range(16)]
    assert found == expected


@pytest.mark.parametrize("backend", ["dali", "pil"])
def test_views_from_a_pack_are_those_from_the_folder(photos, packed, backend):
    views = []
    for location in (photos, packed):
        made = make(location, backend, batch_size=8)
        batches = list(made.epoch(0))
        views.append([(batch.indices.tolist(), batch.labels.tolist(), batch.views[0]) for batch in batches])
        made.close()
    assert len(views[0]) == 2
    for (indices, labels, one), (packed_indices, packed_labels, other) in zip(*views, strict=True):
        assert (indices, labels) == (packed_indices, packed_labels)
        assert torch.equal(one, other)


def test_without_its_index_a_pack_is_any_webdataset(photos, packed):
    shutil.rmtree(packed / PACK_INDEX)
    folder, source = open_source(str(photos)), open_source(str(packed))
    assert source.names.tolist() == folder.names.tolist()
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.classes == ("0", "1", "2", "3")
    assert [source.read(row) for row in range(16)] == [folder.read(row) for row in range(16)]


def test_keys_are_unique_and_a_list_keeps_its_order(tmp_path, picture):
    names = ["x/b.v2.jpg", "a.jpg", "a.png", "x/b_v2.jpg", "a.jpg"]
    for number, name in enumerate(names[:4]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture + bytes([number]))
    (tmp_path / "list.txt").write_text("\n".join(names))
    pack.pack(open_source(str(tmp_path / "list.txt")), tmp_path / "out", 10**6)
    source = open_source(str(tmp_path / "out"))
    assert [os.fsdecode(name) for name in source.names] == names
    assert [source.read(row)[-1] for row in range(5)] == [0, 1, 2, 3, 1]
    assert source.labels.tolist() == [-1] * 5
    with tarfile.open(tmp_path / "out/shard-00000.tar") as tar:
        assert tar.getnames() == ["x/b_v2.jpg", "a.jpg", "a_2.png", "x/b_v2_2.jpg", "a_3.jpg"]


def test_images_that_a_scan_excludes_are_not_packed(photos, tmp_path):
    source = open_source(str(photos))
    source.mark([2, 9], UNWANTED)
    pack.pack(source, tmp_path / "out", 10**9)
    kept = np.delete(source.names, [2, 9])
    assert open_source(str(tmp_path / "out")).names.tolist() == kept.tolist()


@pytest.mark.parametrize("backend", ["dali", "pil"])
def test_an_image_that_a_shard_no_longer_holds_is_named(packed, backend):
    source = open_source(str(packed))
    shards = sorted(packed.glob("*.tar"))
    last = int(source.packed.offset[-1])
    os.truncate(shards[-1], last + 100)
    made = make(source, backend, batch_size=16)
    name = f"{shards[-1].name}/{os.fsdecode(source.names[-1])}"
    with pytest.raises(UserError, match=re.escape(name)):
        list(made.epoch(0))
    made.close()


def test_an_interrupted_pack_is_refused_by_runs_and_started_again(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = ImageSource.read

    def interrupted(source, index):
        if index == 9:
            raise KeyboardInterrupt
        return real(source, index)

    monkeypatch.setattr(ImageSource, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(open_source(str(photos)), out, 20_000)
    assert len(list(out.glob("*.tar"))) > 1
    with refuses("pack-incomplete", "data.train"):
        open_source(str(out))
    monkeypatch.undo()
    pack.pack(open_source(str(photos)), out, 10**6)
    assert [path.name for path in sorted(out.iterdir())] == [PACK_INDEX, "shard-00000.tar"]
    assert len(open_source(str(out))) == 16
    with refuses("exists", "OUT"):
        pack.pack(open_source(str(photos)), out, 10**6)
    (out / PACK_INCOMPLETE).touch()
    (out / "thesis.txt").touch()
    with refuses("exists", "OUT"):
        pack.pack(open_source(str(photos)), out, 10**6)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("shard-00000", "../shard-00000"),
        lambda text: json.dumps(json.loads(text) | {"shards": None}),
        lambda text: text[:50],
    ],
)
def test_an_index_that_is_damaged_or_leads_outside_is_refused(packed, change):
    path = packed / PACK_INDEX / "index.json"
    path.write_text(change(path.read_text()))
    with refuses("damaged-index", "data.train"):
        open_source(str(packed))


def test_the_same_images_give_the_same_shards(photos, packed, tmp_path):
    pack.pack(open_source(str(photos)), tmp_path / "again", 40_000)
    for path in packed.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize(("end", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_shards_are_packed_in_their_order_with_their_labels(photos, tmp_path, end, compress, capsys):
    folder = open_source(str(photos))
    (tmp_path / "small").mkdir()
    for number in range(2):
        members = []
        for row in range(number, 16, 2):
            name = os.fsdecode(folder.names[row]).replace("/", "-")
            members += [(f"{name}.v1.jpg", folder.read(row)), (f"{name}.v1.cls", b"word%d" % folder.labels[row])]
        data = shard(tmp_path / "plain.tar", *members).read_bytes()
        (tmp_path / f"small/{number}.tar.{end}").write_bytes(compress(data))
    assert main(["pack", str(tmp_path / "small"), str(tmp_path / "out")]) == 0
    assert "4 classes (word0, word1, word2, ...) by .cls" in capsys.readouterr().out
    source = open_source(str(tmp_path / "out"))
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    assert [source.read(row) for row in range(16)] == [folder.read(row) for row in order]
    assert source.labels.tolist() == folder.labels[order].tolist()
    assert source.labelling == "by .cls"
    path = tmp_path / f"small/1.tar.{end}"
    os.truncate(path, path.stat().st_size // 2)
    assert refused("prepare", "pack", tmp_path / "small", tmp_path / "again").code == "damaged-shard"


def test_a_compressed_shard_under_the_name_of_a_plain_one_is_refused(tmp_path, picture):
    plain = shard(tmp_path / "s/0.tar", ("a.jpg", picture))
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    with refuses("compressed-shards", "data.train"):
        open_source(str(tmp_path / "s"))


def test_sizes_are_written_in_thousands():
    assert [pack.parse_size(text) for text in ("1GB", "1.5 mb", "20k", "512", "2TB")] == [
        10**9, 1_500_000, 20_000, 512, 2 * 10**12,
    ]  # fmt: skip
    for text in ("big", "0GB", "-1GB", "1XB", ""):
        with refuses("bad-size", "--shard-size"):
            pack.parse_size(text)


def test_the_command_packs_into_a_new_folder_only(photos, tmp_path):
    assert main(["pack", str(photos), str(tmp_path / "out"), "--shard-size", "40kB"]) == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) > 2
    assert refused("prepare", "pack", photos, tmp_path / "out").code == "exists"
    assert refused("prepare", "pack", tmp_path / "nowhere", tmp_path / "o").code == "absent"
