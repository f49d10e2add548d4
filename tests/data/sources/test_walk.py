"""What a folder holds: every image that can be decoded, and a count of everything else by its reason."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsiam.data.decode import decode, decode_image
from fastsiam.data.sources import excluded, formats, walk
from fastsiam.data.sources.excluded import COPIES, HIDDEN_FILES, SYSTEM, UNFINISHED, check, in_words
from fastsiam.data.sources.image_header import BadImageError, read_header
from fastsiam.data.sources.open import open_source
from fastsiam.data.sources.walk import Walk
from fastsiam.prepare.__main__ import main
from fastsiam.prepare.scan import scan
from tests.support.refusals import refuses

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(20)
COLOUR = (200, 40, 90)


def encoded(kind="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), COLOUR).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def put(root, *names, data=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded() if data is None else data)


def listed(root):
    found = Walk(root)
    return sorted(name for name, _ in found), dict(found.excluded)


def test_what_pillow_decodes_is_an_image_whatever_its_extension(tmp_path):
    of_kind = {
        "JPEG": ("a.JPG", "b.jfif", "c.jpe", "no extension", "d.jpg_large", "hash.9f86d081", "e.1"),
        "GIF": ("f.gif", "g.dat"), "PPM": ("h.ppm", "i.pnm", "j.img"), "AVIF": ("k.avif", "l"), "WEBP": ("m.webp", "n"),
        "JPEG2000": ("o.jp2", "p.j2k", "q"), "TGA": ("r.tga",), "BMP": ("s.bmp", "t"), "TIFF": ("u.TIFF", "v"),
        "PNG": ("w.png", "x.apng", "y"), "QOI": ("z.qoi",), "DDS": ("1.dds",), "SGI": ("2.sgi", "3.rgb"),
    }  # fmt: skip
    for kind, names in of_kind.items():
        put(tmp_path, *names, data=encoded(kind))
    put(tmp_path, "4.pgm", data=encoded("PPM", "L"))
    put(tmp_path, "5.pbm", data=encoded("PPM", "1"))
    source = open_source(str(tmp_path))
    assert len(source) == 2 + sum(map(len, of_kind.values()))
    assert source.excluded == {}
    for index, name in enumerate(source.names.tolist()):
        picture = np.asarray(decode_image(source, index)).astype(int)
        assert picture.shape == (16, 24, 3), name
        if not name.endswith((b".pgm", b".pbm")):
            assert np.abs(picture - COLOUR).max() <= 8, name


def test_what_is_not_an_image_is_counted_by_extension_and_texts_are_not_taken_for_pictures(tmp_path):
    put(tmp_path, "1.jpg")
    texts = {"BMW": b"BMW is a make of cars", "P1": b"P1 of the list", "README": b"II*", "c.h": b"#define im_width 64"}
    for name, data in texts.items():
        put(tmp_path, name, data=data)
    put(tmp_path, "a.txt", "b.TXT", "film.mp4", "x.pdf", "odd.foo", data=b"%PDF-1.7 \n\5\1")
    put(tmp_path, "pages.ps", "drawing.eps", data=b"%!PS-Adobe-3.0 EPSF-3.0")
    names, found = listed(tmp_path)
    assert names == ["1.jpg"]
    assert found == {
        formats.NAMELESS: 3, ".h": 1, ".txt": 2, ".mp4": 1, ".pdf": 1, ".foo": 1, ".ps": 1,
        ".eps (convert them to .png)": 1,
    }  # fmt: skip


def test_a_gzipped_image_is_missed_and_named_with_what_to_do(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    (tmp_path / "b.PNG.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "weights.gz").write_bytes(b"\x1f\x8b")
    assert open_source(str(tmp_path)).excluded == {excluded.GZIPPED: 1, ".gz": 1}
    with refuses("too-many-excluded"):
        open_source(str(tmp_path), max_bad_fraction=0.1)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "it is empty"), (b"<html>", "it is not an image"), (None, "No such file or directory")]
)
def test_the_reason_why_a_file_is_not_an_image_is_plain_text(tmp_path, data, reason):
    path = tmp_path / "a.jpg"
    if data is not None:
        path.write_bytes(data)
    for reader in (read_header, decode):
        with pytest.raises(BadImageError) as error:
            reader(path)
        assert str(path) in str(error.value)
        assert reason in str(error.value)
        assert not {"<", "[", "'"} & set(str(error.value))


def test_a_decoder_that_is_not_there_is_named_with_its_cure(tmp_path, monkeypatch):
    for cached in (formats.by_extension, formats._readable):
        cached.cache_clear()
    monkeypatch.setattr(formats, "_PLUGINS", ())
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    check_feature = formats.features.check
    monkeypatch.setattr(formats.features, "check", lambda name: name != "avif" and check_feature(name))
    try:
        put(tmp_path, "a.HEIC", "b", "c.heif", "misnamed.foo", data=HEIC)
        put(tmp_path, "d.avif", data=encoded("AVIF"))
        put(tmp_path, "raw.NEF", "raw.dng", "scan.svs", data=encoded("TIFF"))
        assert listed(tmp_path)[1] == {
            ".heic (pip install pillow-heif)": 3, ".heif (pip install pillow-heif)": 1,
            ".avif (pip install --upgrade pillow)": 1, ".nef (convert them to .jpg)": 1,
            ".dng (convert them to .jpg)": 1, ".svs (cut them into tiles)": 1,
        }  # fmt: skip
        put(tmp_path, "phone.jpg", data=HEIC)
        with pytest.raises(BadImageError, match=r"phone.jpg cannot be decoded: it is .heic \(pip install pi"):
            read_header(tmp_path / "phone.jpg")
    finally:
        monkeypatch.undo()
        for cached in (formats.by_extension, formats._readable):
            cached.cache_clear()


LEFTOVERS = (
    "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/1.jpg/T.jpg", "cat/._1.jpg", "#recycle/1.jpg",
    "$RECYCLE.BIN/S-1/$R1.jpg", "System Volume Information/1.jpg", "lost+found/1.jpg", "__MACOSX/cat/2.jpg",
    ".ipynb_checkpoints/1-checkpoint.jpg", ".Trash-1000/files/1.jpg", "~snapshot/1.jpg", ".snapshot/1.jpg",
    ".@__thumb/1.jpg", "@Recycle/1.jpg", ".Spotlight-V100/1.jpg", ".thumbnails/1.jpg", "cat/Thumbs.db",
    "cat/.DS_Store", "cat/desktop.ini", "cat/.nfs000001", "cat/1.jpg:Zone.Identifier", "cat/1.jpg@SynoEAStream",
)  # fmt: skip


def test_what_systems_leave_behind_is_neither_an_image_nor_a_class(tmp_path):
    put(tmp_path, "cat/1.jpg", "dog/2.jpg", *LEFTOVERS, "cat/.mine.jpg")
    put(tmp_path, "cat/1.jpg~", "cat/1.jpg_original", "cat/3.jpg.bak", "cat/4.jpg.crdownload", "cat/5.jpg.part")
    source = open_source(str(tmp_path))
    assert source.names.tolist() == [b"cat/1.jpg", b"dog/2.jpg"]
    assert source.classes == ("cat", "dog")
    assert source.excluded == {SYSTEM: len(LEFTOVERS), HIDDEN_FILES: 1, COPIES: 3, UNFINISHED: 2}
    check(source.excluded, len(source), source.root, "data.train", 0.0)


def test_links_and_what_is_not_a_file(tmp_path):
    root = tmp_path / "images"
    put(root, "b/1.jpg", "b/2.jpg")
    put(tmp_path / "elsewhere", "3.jpg")
    for name, target in {
        "a": "b", "b/up": "..", "z": "../elsewhere", "c": "../elsewhere", "self": "self", "me.jpg": "me.jpg",
        "gone.jpg": "nowhere.jpg", "gone": "nowhere", "b/gone.txt": "nowhere.txt", "4.jpg": "b/1.jpg",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(root / "socket.png"))
        names, found = listed(root)
    # Real folders first, then links by name: not as a file system happens to give them.
    assert names == ["4.jpg", "b/1.jpg", "b/2.jpg", "c/3.jpg"]
    assert found == {
        "links to a folder already seen": 3, "links onto themselves": 2, "dead links": 2, ".txt": 1,
        "pipes, sockets or devices": 3,
    }  # fmt: skip


@pytest.fixture
def refusing(monkeypatch):
    """Folders and files of these names may not be read, for root neither."""
    names = {}

    def refuse(real):
        def asked(path, *arguments, **options):
            if error := names.get(Path(path).name):
                raise error(13, "Permission denied", path) if error is PermissionError else error(2, "Gone", path)
            return real(path, *arguments, **options)

        return asked

    for function in ("scandir", "stat"):
        monkeypatch.setattr(walk.os, function, refuse(getattr(os, function)))
    return names


def test_folders_that_may_not_be_read_or_disappear_are_excluded(tmp_path, refusing):
    put(tmp_path, "cat/1.jpg", "dog/2.jpg", "closed/3.jpg", "going/4.jpg")
    refusing |= {"closed": PermissionError, "going": FileNotFoundError}
    found = Walk(tmp_path)
    assert sorted(name for name, _ in found) == ["cat/1.jpg", "dog/2.jpg"]
    assert found.excluded == {"folders that may not be read": 1, "that have gone meanwhile": 1}
    assert found.closed == ["closed"]
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    refusing[tmp_path.name] = PermissionError
    with refuses("unreadable", "data.train"):
        open_source(str(tmp_path))


def test_many_files_of_one_unknown_extension_are_judged_by_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "_OPENED", 10)
    opened, look = [], Walk._look
    monkeypatch.setattr(Walk, "_look", lambda self, *a: opened.append(a[1][0]) or look(self, *a))
    put(tmp_path, *(f"{number:04}" for number in range(50)))
    assert len(listed(tmp_path)[0]) == 50
    assert len(opened) == 10
    put(tmp_path, *(f"text{number:04}" for number in range(50)), data=b"text")
    assert len(listed(tmp_path)[0]) == 50
    assert listed(tmp_path)[1] == {formats.NAMELESS: 50}


def test_a_share_of_excluded_files_above_the_limit_is_refused(tmp_path):
    put(tmp_path, *(f"{number}.jpg" for number in range(18)), "notes.txt", "a.svg")
    root = str(tmp_path)
    with refuses("too-many-excluded", "data.train") as error:
        open_source(root, max_bad_fraction=0.001)
    assert "data.max_bad_fraction=0.06" in str(error.value)
    assert len(str(error.value)) <= 300
    source = open_source(root, max_bad_fraction=0.06)
    assert source.exclusion_texts() == [f"1 .svg (convert them to .png), 1 .txt under {root}"]
    for number in range(99):
        check({"dead links": number}, 99 - number, tmp_path, "data.train", number / 99)


def test_empty_files_are_counted_before_they_are_met_and_keep_their_places(tmp_path):
    root = tmp_path / "images"
    put(root, "1.jpg", data=b"")
    for name in ("0", "2", "3"):
        pixels = np.random.default_rng(int(name)).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.jpg")
    source = open_source(str(root))
    assert source.excluded == {"empty files": 1}
    with refuses("too-many-excluded") as error:
        open_source(str(root), max_bad_fraction=0.2)
    assert str(error.value).endswith("data.max_bad_fraction=0.3")
    # What a scan has found does not count.
    scan(source, tmp_path / "found.tsv", workers=0)
    source = open_source(str(root), scanned=str(tmp_path / "found.tsv"), max_bad_fraction=0)
    assert (source.excluded, "1 empty" in source.excluded_by_scan) == ({}, True)


def test_exclusions_in_words_begin_with_possible_images_and_stay_short():
    found = {".txt": 9000, ".json": 5, ".csv": 3, ".xml": 2, ".md": 1, "dead links": 1, ".heic (pip install x)": 2}
    text = in_words(found)
    assert text == "2 .heic (pip install x), 1 dead link, 9,000 .txt, 5 .json, 3 .csv and 3 others"
    assert in_words({}) == ""


def test_scan_and_pack_name_excluded_files_and_continue(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    put(root, "1.jpg", "2.jpg")
    (root / "self").symlink_to("self")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    for command in (["pack"], ["scan", "--workers", "0"]):
        out = [] if command[0] == "scan" else [str(tmp_path / "packed")]
        assert main([*command, str(root), *out]) == 0
        assert f"1 dead link, 1 link onto itself under {root}\n" in capsys.readouterr().out


def test_paths_of_many_images_are_those_of_each(tmp_path):
    """Names of several lengths, one of them with a byte that is no UTF-8."""
    for name in (b"a/1.jpg", b"a/longer name.jpg", b"b/\xff.jpg"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")
    source = open_source(str(tmp_path))
    indices = np.array([2, 0, 1, 0])
    assert source.paths(indices) == [os.fsencode(source.path(index)) for index in indices]
    assert {os.path.basename(path) for path in source.paths(indices)} == {b"1.jpg", b"longer name.jpg", b"\xff.jpg"}
