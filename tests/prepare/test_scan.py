"""A scan finds what is wrong with each file, resumes where it was stopped, and runs exclude what it found."""

import io
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from fastsiam.data.build import build_loader
from fastsiam.data.sources import open as sources
from fastsiam.data.sources import scan_manifest
from fastsiam.data.sources import source as source_module
from fastsiam.data.sources.image_header import ODD, PLAIN, UNKNOWN, UNREADABLE, UNWANTED
from fastsiam.data.sources.index_cache import cache_folder
from fastsiam.data.sources.open import open_source
from fastsiam.prepare import scan
from fastsiam.prepare.__main__ import main
from fastsiam.prepare.pack import pack
from tests.support.loaders import make
from tests.support.refusals import refused, refuses
from tests.support.tiffs import tiff_of


def noise(seed, size=(24, 30), channels=3):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(values.squeeze())


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def files():
    """Name to (bytes, verdict, kind, size) of one file for each verdict and each way to it."""
    good, large = encoded(noise(0)), encoded(noise(1, (100, 90)))
    tall, wide = (30, 24), (90, 100)
    deep = np.random.default_rng(2).integers(0, 65536, (24, 24), np.uint16)
    frames = {"save_all": True, "append_images": [noise(4, (24, 24))]}
    none = (0, 0)
    return {
        "a_good.jpg": (good, "ok", PLAIN, tall),
        "b_good.png": (encoded(noise(3), "PNG"), "ok", PLAIN, tall),
        "c_palette.png": (encoded(noise(3).quantize(16), "PNG"), "ok", ODD, tall),
        "d_same.jpg": (good, "duplicate", PLAIN, tall),
        "e_cut.jpg": (encoded(noise(5))[:-300], "truncated", PLAIN, tall),
        "f_cut_in_header.jpg": (good[:40], "truncated", UNKNOWN, none),
        "g_cut.png": (encoded(noise(6), "PNG")[:900], "truncated", PLAIN, tall),
        "h_empty.jpg": (b"", "empty", UNKNOWN, none),
        "i_empty.jpg": (b"", "empty", UNKNOWN, none),
        "j_page.jpg": (b"<html>404</html>", "not an image", UNKNOWN, none),
        "k_large.jpg": (large, "too large", PLAIN, wide),
        "l_black.jpg": (encoded(Image.new("RGB", (24, 24))), "constant", PLAIN, (24, 24)),
        "m_cmyk.jpg": (encoded(noise(7, channels=4).convert("CMYK")), "CMYK", ODD, tall),
        "n_deep.png": (encoded(Image.fromarray(deep), "PNG"), "16-bit", ODD, (24, 24)),
        "o_grey.jpg": (encoded(noise(8, channels=1)), "greyscale", PLAIN, tall),
        "p_frames.png": (encoded(noise(9, (24, 24)), "PNG", **frames), "animated", ODD, (24, 24)),
        "q with\ttab.jpg": (encoded(noise(10)), "ok", PLAIN, tall),
    }


LIMIT = 5000
EXCLUDED = ("duplicate", "truncated", "empty", "not an image", "too large", "constant")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    root.mkdir()
    for name, (data, *_) in files().items():
        (root / name).write_bytes(data)
    return root


def scanned(folder, **options):
    source = sources.open_unscanned(str(folder), "scan")
    path = scan_manifest.default_path(cache_folder(folder))
    return scan.scan(source, path, **{"workers": 0, "max_pixels": LIMIT, **options})


def test_each_file_gets_its_verdict(folder):
    rows = scanned(folder)
    found = {row.name.decode(): (row.verdict, row.kind, (row.height, row.width)) for row in rows}
    assert found == {name: tuple(expected) for name, (_, *expected) in files().items()}
    others = {"unreadable", "not supported", "32-bit", "float"}
    assert {row.verdict for row in rows} == set(scan_manifest.VERDICTS) - others
    assert [row.file_size for row in rows] == [len(data) for data, *_ in files().values()]
    assert scan_manifest.read_rows(scan_manifest.default_path(cache_folder(folder))) == rows


def test_a_whole_file_that_nobody_decodes_is_not_called_truncated(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    (tmp_path / "bands.tif").write_bytes(tiff_of(np.zeros((8, 8, 5), np.uint8)))
    (tmp_path / "double.tif").write_bytes(tiff_of(np.zeros((8, 8), np.float64)))
    (tmp_path / "cut.tif").write_bytes(encoded(noise(5), "TIFF")[:300])
    source = sources.open_unscanned(str(tmp_path), "scan")
    verdicts = [row.verdict for row in scan.scan(source, tmp_path / "out.tsv", workers=0)]
    assert verdicts == ["not supported" if name != b"cut.tif" else "truncated" for name in source.names.tolist()]


@pytest.mark.slow
def test_worker_processes_find_the_same(folder):
    alone = scanned(folder)
    shutil.rmtree(cache_folder(folder))
    seen = []
    assert scanned(folder, workers=2, progress=lambda done, total: seen.append((done, total))) == alone
    assert seen[-1] == (17, 17)


def test_a_stopped_scan_goes_on_where_it_was(folder, monkeypatch):
    expected = scanned(folder)
    shutil.rmtree(cache_folder(folder))
    monkeypatch.setattr(scan, "_CHUNK", 3)
    examined = []
    real = scan.examine

    def examine(source, index, max_pixels):
        examined.append(index)
        if len(examined) in (8, 15):
            raise KeyboardInterrupt
        return real(source, index, max_pixels)

    monkeypatch.setattr(scan, "examine", examine)
    path = scan_manifest.default_path(cache_folder(folder))
    with pytest.raises(KeyboardInterrupt):
        scanned(folder)
    with open(path, "ab") as file:
        file.write(b"g_cut.png\t90")
    with pytest.raises(KeyboardInterrupt):
        scanned(folder)
    # Rows 4 and 5 are of bad files, which are not trusted.
    assert examined[8:15] == [4, 5, 6, 7, 8, 9, 10]
    assert scanned(folder) == expected
    assert examined[15:] == [4, 5, 6, *range(7, 17)]
    examined.clear()
    assert scanned(folder) == expected
    bad = [i for i, row in enumerate(expected) if row.verdict in ("duplicate", "truncated", "empty", "not an image")]
    assert examined == bad


def test_a_stopped_command_exits_with_130(folder, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "examine", stop)
    assert main(["scan", str(folder), "--workers", "0"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_what_has_changed_is_scanned_again(folder):
    scanned(folder)
    (folder / "a_good.jpg").unlink()
    (folder / "e_cut.jpg").write_bytes(encoded(noise(5)))
    (folder / "new.jpg").write_bytes(b"")
    verdicts = {row.name.decode(): row.verdict for row in scanned(folder)}
    assert "a_good.jpg" not in verdicts
    assert (verdicts["d_same.jpg"], verdicts["e_cut.jpg"], verdicts["new.jpg"]) == ("ok", "ok", "empty")
    verdicts = {row.name.decode(): row.verdict for row in scanned(folder, max_pixels=10**6)}
    assert verdicts["k_large.jpg"] == "ok"
    verdicts = {row.name.decode(): row.verdict for row in scanned(folder, max_pixels=600)}
    assert verdicts["b_good.png"] == "too large"
    assert verdicts["n_deep.png"] == "16-bit"


def test_runs_find_the_manifest_and_read_no_header_that_it_holds(folder, monkeypatch):
    assert open_source(str(folder)).excluded_by_scan == ""
    scanned(folder)
    source = open_source(str(folder))
    for index, (name, (_, verdict, kind, size)) in enumerate(files().items()):
        decodes = verdict not in ("truncated", "empty", "not an image")
        expected = kind if verdict not in EXCLUDED else UNWANTED if decodes else UNREADABLE
        assert source.kinds[index] == expected, name
        assert source.image_sizes[index].tolist() == list(size), name
    monkeypatch.setattr(source_module, "read_header", lambda *a: pytest.fail("a header was read"))
    assert source.look(np.arange(17)) == {}
    path = scan_manifest.default_path(cache_folder(folder))
    assert source.excluded_by_scan == (
        f"9 of the 17 images under {folder}, by {path}: 2 empty, 1 not an image, 3 truncated, 1 too large, "
        "1 duplicate, 1 constant"
    )


@pytest.mark.parametrize("backend", ["dali", "pil"])
def test_images_that_a_scan_excludes_are_not_used_and_not_counted(folder, backend):
    rows = scanned(folder)
    made = make(folder, backend, batch_size=8)
    used = np.concatenate([batch.indices for epoch in range(4) for batch in made.epoch(epoch)])
    made.close()
    assert len(used) == 4 * 16
    assert {rows[index].verdict for index in used} == {"ok", "CMYK", "16-bit", "greyscale", "animated"}
    assert made.skip.found == {}


def test_a_scan_that_has_only_begun_says_nothing_to_a_run(folder):
    path = scan_manifest.default_path(cache_folder(folder))
    scan_manifest.begin(path)
    source = open_source(str(folder))
    assert (source.excluded_by_scan, len(source)) == ("", 17)
    with refuses("manifest-names-none", "data.manifest"):
        open_source(str(folder), scanned=str(path))


def test_a_manifest_elsewhere_is_named_by_the_config(folder, tmp_path, tiny_config):
    path = tmp_path / "found.tsv"
    scan.scan(sources.open_unscanned(str(folder), "scan"), path, workers=0, max_pixels=LIMIT)
    assert open_source(str(folder)).excluded_by_scan == ""
    config = tiny_config(f"data.train={folder}", f"data.manifest={path}", "data.val=null", "data.backend=pil")
    assert build_loader(config).source.excluded_by_scan.startswith("9 of the 17 images")
    with refuses("no-manifest", "data.manifest"):
        open_source(str(folder), scanned=str(tmp_path / "nowhere.tsv"))
    (tmp_path / "list.txt").write_text("images/a_good.jpg\n")
    with refuses("manifest-names-none", "data.manifest"):
        open_source(str(tmp_path / "list.txt"), scanned=str(path))
    with refuses("bad-manifest", "data.manifest"):
        open_source(str(folder), scanned=str(tmp_path / "list.txt"))


def test_a_run_names_its_exclusions(demo_folder, tmp_path, tiny, capsys):
    from fastsiam.train import main as train

    shutil.copytree(demo_folder, tmp_path / "demo")
    cut = sorted((tmp_path / "demo/train").rglob("*.jpg"))[7]
    cut.write_bytes(cut.read_bytes()[:400])
    out = tmp_path / "found.tsv"
    assert main(["scan", str(tmp_path / "demo/train"), "--workers", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"truncated\t{cut.parent.name}/{cut.name}" in printed.splitlines()
    where = [f"data.train={tmp_path}/demo/train", "data.val=null", "data.max_bad_fraction=0", "train.epochs=1"]
    where.append(f"data.manifest={out}")
    for more in (["--dry-run"], []):
        assert train(["--config", "quickstart", *more, *tiny(*where)]) == 0
        printed = "".join(capsys.readouterr())
        assert f"1 of the 80 images under {tmp_path}/demo/train, by {out}: 1 truncated\n" in printed


def test_a_line_counts_only_for_the_file_that_was_scanned(folder):
    scanned(folder)
    (folder / "e_cut.jpg").write_bytes(encoded(noise(5)))
    (folder / "0_new.jpg").write_bytes(encoded(noise(50)))
    source = open_source(str(folder))
    names = source.names.tolist()
    assert source.kinds[names.index(b"e_cut.jpg")] == UNKNOWN
    assert source.kinds[names.index(b"0_new.jpg")] == UNKNOWN
    assert source.kinds[names.index(b"k_large.jpg")] == UNWANTED
    assert source.kinds[names.index(b"q with\ttab.jpg")] == PLAIN


def test_a_list_that_names_a_file_twice_keeps_it_once(folder, tmp_path):
    (tmp_path / "list.txt").write_text("images/b_good.png\nimages/a_good.jpg\nimages/b_good.png\n")
    assert [row.verdict for row in scanned(tmp_path / "list.txt")] == ["ok", "ok", "duplicate"]
    assert open_source(str(tmp_path / "list.txt")).kinds.tolist() == [PLAIN, PLAIN, UNWANTED]


def test_nothing_left_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"")
    scanned(tmp_path / "images")
    with refuses("none-usable", "data.train"):
        open_source(str(tmp_path / "images"))


def test_packed_images_are_scanned_where_they_lie(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack(open_source(str(photos)), tmp_path / "packed", 10**9)
    shard = tmp_path / "packed/shard-00000.tar"
    source = open_source(str(tmp_path / "packed"))
    with open(shard, "r+b") as file:
        file.truncate(int(source.packed.offset[-1]) + 100)
    rows = scanned(tmp_path / "packed", max_pixels=scan.PIXEL_LIMIT)
    assert [row.verdict for row in rows][-1] == "unreadable"
    assert {row.verdict for row in rows[:-1]} == {"ok", "greyscale"}
    assert open_source(str(tmp_path / "packed")).kinds[-1] == UNREADABLE


def test_the_command_lists_excluded_and_reported_files(folder, tmp_path, capsys):
    out = tmp_path / "found.tsv"
    assert main(["scan", str(folder), "--workers", "0", "--max-pixels", str(LIMIT), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sum(printed.count(f"\n{name}\t") for name in EXCLUDED) == 9
    assert f"manifest  {out}; data.manifest={out} names it to a run" in printed
    for option in ("--max-pixels=0", "--workers=-1"):
        error = refused("prepare", "scan", folder, option)
        assert (error.code, error.key) == ("out-of-range", option.partition("=")[0])


@pytest.mark.parametrize("data", [encoded(noise(0)), b'{"a": 1}', b"a\nb\nc", b"name\tbytes", b"\n"])
def test_a_file_that_is_not_a_manifest_stays_as_it_is(folder, tmp_path, data):
    out = tmp_path / "mine"
    out.write_bytes(data)
    assert refused("prepare", "scan", folder, "--workers", 0, "--out", out).code == "bad-manifest"
    assert out.read_bytes() == data


def test_a_name_that_is_not_utf_8_is_listed(folder, tmp_path, monkeypatch):
    (folder / os.fsdecode(b"z\xff.jpg")).write_bytes(b"")
    out = tmp_path / os.fsdecode(b"\xfe.tsv")
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["scan", str(folder), "--workers", "0", "--out", str(out)]) == 0
    stdout.flush()
    printed = stdout.buffer.getvalue()
    assert b"empty\tz\\xff.jpg\n" in printed
    assert b"\\xfe.tsv names it to a run" in printed
