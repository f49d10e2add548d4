"""The list of a folder is kept, and taken from the cache only while the folder is as it was."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastsiam.data.sources import formats, index_cache
from fastsiam.data.sources import source as source_module
from fastsiam.data.sources.image_header import PLAIN, UNKNOWN, UNREADABLE
from fastsiam.data.sources.index_cache import cache_folder
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.prepare.pack import pack
from tests.support.files import LONG_AGO, settle
from tests.support.loaders import make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 images in 4 classes, 10 pixels wide and 3 to 42 high, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for number in range(40):
        path = root / f"class{number % 4}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 3 + number)).save(path)
    settle(root)
    return root


def columns(source):
    return {
        name: getattr(source, name).tolist() for name in ("names", "file_sizes", "labels", "image_sizes", "kinds")
    } | {"classes": source.classes, "fingerprint": source.fingerprint()}


def test_the_second_start_lists_no_folder_and_looks_at_a_sample_of_the_files(folder, monkeypatch):
    monkeypatch.setattr(index_cache, "_SAMPLE", 7)
    first = columns(open_source(str(folder)))
    looked_at = []
    real = os.stat
    monkeypatch.setattr(os, "scandir", lambda *a: pytest.fail("a folder was listed"))
    monkeypatch.setattr(os, "listdir", lambda *a: pytest.fail("a folder was listed"))
    monkeypatch.setattr(index_cache, "fingerprint", lambda *a: pytest.fail("the fingerprint was computed"))
    monkeypatch.setattr(source_module, "fingerprint", lambda *a: pytest.fail("the fingerprint was computed"))
    monkeypatch.setattr(os, "stat", lambda path, **k: looked_at.append(os.fspath(path)) or real(path, **k))
    second = columns(open_source(str(folder)))
    assert second == first
    files = [path for path in looked_at if str(path).endswith(".png")]
    assert len(files) == len(set(files)) == 7


def test_headers_read_once_are_known_to_the_next_start(folder, monkeypatch):
    (folder / "class0/00.png").write_bytes(b"no picture")
    settle(folder)
    source = open_source(str(folder))
    assert (source.kinds == UNKNOWN).all()
    assert list(source.look(np.arange(30))) == [0]
    assert source.kinds[:31].tolist() == [UNREADABLE] + [PLAIN] * 29 + [UNKNOWN]
    monkeypatch.setattr(source_module, "read_header", lambda *a: pytest.fail("a header was read again"))
    again = open_source(str(folder))
    # A file that could not be read is tried again, and counts again.
    assert again.kinds[:31].tolist() == [UNKNOWN] + [PLAIN] * 29 + [UNKNOWN]
    assert again.sizes(np.arange(1, 30)).tolist() == source.image_sizes[1:30].tolist()
    assert again.sizes(np.array([1]))[0].tolist() == [7, 10]


CHANGES = {
    "added": lambda root: Image.new("RGB", (4, 4)).save(root / "class1/added.png"),
    "removed": lambda root: (root / "class1/01.png").unlink(),
    "a class renamed": lambda root: (root / "class2").rename(root / "renamed"),
    "rewritten": lambda root: (root / "class3/03.png").write_bytes(b"other bytes"),
    "touched": lambda root: os.utime(root / "class3/03.png", (LONG_AGO + 5, LONG_AGO + 5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_listed_anew(folder, change, monkeypatch):
    open_source(str(folder))
    change(folder)
    listed = []
    walk = index_cache.Walk
    monkeypatch.setattr(index_cache, "Walk", lambda *a: listed.append(1) or walk(*a))
    changed = columns(open_source(str(folder)))
    assert listed == [1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "another cache"))
    assert changed == columns(open_source(str(folder)))


def test_a_folder_that_has_just_changed_is_not_cached(folder):
    os.utime(folder / "class0")
    open_source(str(folder))
    assert not cache_folder(folder).exists()
    settle(folder)
    open_source(str(folder))
    assert (cache_folder(folder) / "index/index.json").exists()


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    expected = columns(open_source(str(folder)))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = open_source(str(folder))
    assert columns(source) == expected
    source.look(np.arange(3))
    assert source.kinds[:3].tolist() == [PLAIN] * 3


def test_a_cache_that_can_only_be_read_serves_and_stays_as_it_is(folder, monkeypatch):
    open_source(str(folder))
    monkeypatch.setattr(os, "access", lambda *a: False)
    source = open_source(str(folder))
    assert source.cached_kinds is None
    assert source.sizes(np.array([0])).tolist() == [[3, 10]]
    assert open_source(str(folder)).kinds.tolist() == [UNKNOWN] * 40


@pytest.mark.parametrize("damage", ["kinds.npy", "names.npy", "index.json"])
def test_a_damaged_cache_is_made_anew(folder, damage):
    expected = columns(open_source(str(folder)))
    path = cache_folder(folder) / "index" / damage
    path.write_bytes(path.read_bytes()[:20])
    assert columns(open_source(str(folder))) == expected
    assert path.stat().st_size > 20


def test_a_size_that_a_crash_has_lost_is_read_again(folder):
    open_source(str(folder)).look(np.arange(40))
    open_source(str(folder)).image_sizes[5] = 0
    source = open_source(str(folder))
    assert source.kinds[5] == UNKNOWN
    assert (source.sizes(np.array([5])) > 0).all()


@pytest.mark.slow
def test_a_file_that_was_replaced_in_place_fails_once_and_is_read_again_at_the_next_start(folder):
    def epoch():
        return next(make(folder, "dali", batch_size=40).epoch(0))

    epoch()
    path = folder / "class1/01.png"
    size = path.stat().st_size
    smaller = io.BytesIO()
    Image.new("RGB", (10, 3)).save(smaller, "PNG")
    path.write_bytes(smaller.getvalue().ljust(size, b"\0"))
    settle(folder)
    with pytest.raises(UserError, match=r"01.png .*\[3, 10\].*\[4, 10\]"):
        epoch()
    assert len(epoch().indices) == 40


def test_of_two_first_starts_the_slower_uses_the_index_of_the_faster(folder, monkeypatch):
    faster, real = [], index_cache.write_index

    def late(*arguments):
        monkeypatch.setattr(index_cache, "write_index", real)
        faster.append(open_source(str(folder)))
        real(*arguments)

    monkeypatch.setattr(index_cache, "write_index", late)
    slower = open_source(str(folder))
    faster[0].look(np.arange(20))
    slower.look(np.arange(20, 40))
    assert open_source(str(folder)).kinds.tolist() == [PLAIN] * 40
    assert [path.name for path in cache_folder(folder).iterdir()] == ["index"]


def test_two_folders_have_two_caches_and_links_to_one_share_it(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert cache_folder(tmp_path / "link") == cache_folder(folder) != cache_folder(folder / "class0")
    through_link = open_source(str(tmp_path / "link"))
    assert through_link.root == tmp_path / "link"
    assert len(open_source(str(folder / "class0"))) == 10


def test_foreign_shards_are_read_through_once(folder, monkeypatch):
    shards = folder.parent / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for path in sorted((folder / f"class{number}").iterdir()):
                tar.add(path, f"{number}-{path.name}")
    settle(shards)
    first = open_source(str(shards))
    first.look(np.arange(20))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("a shard was read again"))
        second = open_source(str(shards))
    assert columns(second) == columns(first)
    assert [second.read(row) for row in range(20)] == [first.read(row) for row in range(20)]
    with tarfile.open(shards / "1.tar", "a") as tar:
        tar.add(folder / "class3/03.png", "added.png")
    assert len(open_source(str(shards))) == 21


def test_a_pack_of_an_earlier_version_is_read_as_it_is(folder, tmp_path):
    pack(open_source(str(folder)), tmp_path / "packed", 10**9)
    expected = columns(open_source(str(tmp_path / "packed")))
    note = tmp_path / "packed" / index_cache.PACK_INDEX / "index.json"
    fields = json.loads(note.read_text()) | {"version": 1}
    del fields["left_out"]
    note.write_text(json.dumps(fields))
    earlier = open_source(str(tmp_path / "packed"))
    assert earlier.look(np.arange(40)) == {}
    assert columns(earlier) == expected


def test_exclusions_are_kept_with_the_list_until_they_can_be_read(folder, monkeypatch):
    (folder / "class0/gone.png").symlink_to(folder.parent / "disk/gone.png")
    (folder / "class1/phone.heic").write_bytes(b"")
    (folder / "class2/notes.txt").write_text("")
    settle(folder)
    monkeypatch.setitem(formats.by_extension(), ".heic", ".heic (pip install pillow-heif)")
    first = open_source(str(folder))
    assert first.excluded == {"dead links": 1, ".heic (pip install pillow-heif)": 1, ".txt": 1}
    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "Walk", lambda *a: pytest.fail("the folder was listed again"))
        assert open_source(str(folder)).excluded == first.excluded
    # No mtime below the folder changes where a disk is mounted, or a decoder installed.
    (folder.parent / "disk").mkdir()
    Image.new("RGB", (4, 4)).save(folder.parent / "disk/gone.png")
    assert (len(first), len(open_source(str(folder)))) == (40, 41)
    monkeypatch.setitem(formats.by_extension(), ".heic", formats.IMAGE)
    monkeypatch.setattr(formats, "decoders", lambda: "another Pillow")
    assert len(open_source(str(folder))) == 42
