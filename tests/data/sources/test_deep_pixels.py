"""Pixels of more than eight bits: read as they were written, and shown with their contrast by every backend."""

import dataclasses
import json
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from fastsiam.config import load_config
from fastsiam.data.decode import decode
from fastsiam.data.sources import deep_pixels, scan_manifest
from fastsiam.data.sources.deep_pixels import Deep
from fastsiam.data.sources.image_header import ODD, BadImageError, read_header
from fastsiam.data.sources.index_cache import cache_folder
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.open import open_source, open_unscanned
from fastsiam.data.sources.pixel_range import measured, range_file
from fastsiam.prepare import scan
from fastsiam.run.training_data import with_levels
from fastsiam.runtime.distributed import World
from fastsiam.train import opened
from tests.support.ffcv_files import beton_of
from tests.support.images import exif_block
from tests.support.loaders import squashed
from tests.support.tiffs import tiff_of

SIZE = 32
HEIGHT, WIDTH = 48, 64


def png(values, exif=b"", late=False):
    """A PNG of 16 bits, of values [H, W, 1 to 4]; `late`: its EXIF block is behind the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, bands = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    pixels, block = chunk(b"IDAT", zlib.compress(rows)), chunk(b"eXIf", exif) if exif else b""
    middle = pixels + block if late else block + pixels
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle + chunk(b"IEND", b"")


def ramps(bands):
    """Slopes from 0 to 1 [H, W, bands], each in a direction of its own."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / [[[HEIGHT - 1]], [[WIDTH - 1]]]
    return np.stack([(x * (band + 1) + y * (4 - band)) / 5 for band in range(bands)], 2)


def scaled(bands, low, high, dtype):
    return np.rint(low + ramps(bands) * (high - low)).astype(dtype)


def with_holes():
    values = ramps(1)[..., 0].astype(np.float32)
    values[:4, :4], values[4:8, :4], values[8:10, :2] = np.nan, np.inf, -np.inf
    return values


def in_tiff(values, kind, **options):
    return tiff_of(values, **options), values, kind


GREY_12 = scaled(1, 0, 4095, np.uint16)
# How each file is written, the values that it holds, and its kind.
FILES = {
    "grey.png": (png(GREY_12), GREY_12[..., 0], "16-bit PNG"),
    "alpha.png": (png(scaled(2, 0, 4095, np.uint16)), GREY_12[..., 0], "16-bit PNG"),
    "colour.png": (png(scaled(3, 0, 4095, np.uint16)), scaled(3, 0, 4095, np.uint16), "16-bit PNG"),
    "layers.png": (png(scaled(4, 0, 4095, np.uint16)), scaled(3, 0, 4095, np.uint16), "16-bit PNG"),
    "reflectance.tif": in_tiff(scaled(1, 0, 10000, np.uint16)[..., 0], "16-bit TIFF"),
    "colour.tif": in_tiff(scaled(3, 0, 10000, np.uint16), "16-bit TIFF", order=">", photometric=2),
    "hounsfield.tif": in_tiff(scaled(1, -1000, 2000, np.int16)[..., 0], "signed 16-bit TIFF"),
    "counts.tif": in_tiff(scaled(1, 0, 3e9, np.uint32)[..., 0], "32-bit TIFF"),
    "wide.tif": in_tiff(scaled(1, -9e5, 9e5, np.int32)[..., 0], "signed 32-bit TIFF", order=">"),
    "small.tif": in_tiff(scaled(1, -100, 100, np.int8)[..., 0], "signed 8-bit TIFF"),
    "zero to one.tif": in_tiff(with_holes(), "32-bit float TIFF"),
    "x.pgm": (b"P5 64 48 65535\n" + GREY_12.astype(">u2").tobytes(), GREY_12[..., 0], "16-bit PPM"),
}  # fmt: skip


def expected(values, low, high):
    """Levels of each value, worked out without the product's code."""
    levels = np.clip(np.rint((values.astype(np.float64) - low) * 255 / (high - low)), 0, 255)
    levels = np.where(np.isnan(levels), 0, levels).astype(np.uint8)
    return levels if levels.ndim == 3 else np.repeat(levels[..., None], 3, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("deep")
    for name, (data, _, _) in FILES.items():
        # The extension of a PGM is looked for by some versions only.
        (root / name.replace(".pgm", ".pgm.png")).write_bytes(data)
    return root


def name_of(source, index):
    return bytes(source.names[index]).decode().replace(".pgm.png", ".pgm")


@pytest.mark.parametrize("name", FILES)
def test_the_values_are_those_that_were_written(name):
    data, values, kind = FILES[name]
    with deep_pixels.open_picture(data) as picture:
        assert deep_pixels.kind_of(picture) == kind
        assert np.array_equal(deep_pixels.read(picture).values, values, equal_nan=values.dtype.kind == "f")
    assert read_header(data) == (HEIGHT, WIDTH, ODD)


@pytest.mark.parametrize("backend", ["dali", "pil", "ffcv", "resident"])
def test_every_backend_shows_them_alike_and_with_their_contrast(folder, backend):
    """Within a level of the values' own picture; the ranges are those of the sample, of a kind each."""
    source = open_source(str(folder))
    ranges = source.levels.ranges
    assert set(ranges) == {kind for _, _, kind in FILES.values()}
    crops = squashed(beton_of(folder, "raw") if backend == "ffcv" else source, backend, SIZE)
    for index, crop in enumerate(crops.astype(int)):
        name = name_of(source, index)
        _, values, kind = FILES[name]
        picture = Image.fromarray(expected(values, *ranges[kind]))
        resized = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(crop - resized).max() <= 1, name
        # Three of 4.3 billion and 200 of 255 fill their types; ten thousand of 65,535 are spread.
        assert np.ptp(crop) > (170 if name in ("counts.tif", "small.tif") else 225), name


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_exif_turns_them(bands, late):
    values = scaled(bands, 0, 4095, np.uint16)
    data = png(values, exif_block("<", 3, 6)[6:], late)
    assert read_header(data) == (WIDTH, HEIGHT, ODD)
    shown = expected(values[..., 0] if bands < 3 else values[..., :3], 0, 4095)
    assert np.array_equal(np.asarray(decode(data, levels=Levels("0..4095"))), np.rot90(shown, -1))


def test_a_range_of_ones_own_and_that_of_the_type():
    values = np.array([[-2000, -1000, 500, 2000, 3000]], np.int16)
    pixels = Deep(values, "signed 16-bit TIFF", (-32768.0, 32767.0), False, 1)
    assert Levels("-1000..2000").shown(pixels).tolist() == [[0, 0, 128, 255, 255]]
    assert Levels("type").shown(pixels).tolist() == [[120, 124, 129, 135, 139]]
    assert Levels("scale", {"signed 16-bit TIFF": (-1000, 2000)}).shown(pixels).tolist() == [[0, 0, 128, 255, 255]]
    # A kind that no sample has shown: from black to white by its own values.
    assert Levels().shown(pixels)[0, [0, -1]].tolist() == [0, 255]
    assert Levels("-1000..2000").shown(pixels._replace(inverted=True)).tolist() == [[255, 255, 127, 0, 0]]
    floats = Deep(np.array([[0, 0.5, 1, np.nan]], np.float32), "32-bit float TIFF", (0.0, 1.0), False, 1)
    assert Levels("type").shown(floats).tolist() == [[0, 128, 255, 0]]
    full = Deep(np.arange(0, 65536, 5, dtype=np.uint16)[None], "16-bit PNG", (0.0, 65535.0), False, 1)
    # What fills its type keeps the upper byte, bit for bit.
    for asked in ("scale", "type"):
        assert np.array_equal(Levels(asked).shown(full), full.values >> 8)


def test_images_of_eight_bits_cost_no_look_and_keep_their_stores(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.JPG")
    monkeypatch.setattr(deep_pixels, "open_picture", lambda *a: pytest.fail("a file was opened"))
    levels = open_source(str(tmp_path)).levels
    assert (levels.ranges, levels.text(), levels.tag()) == ({}, "", "")


def test_what_gdal_leaves_out_is_black_and_sets_no_range(tmp_path):
    values = scaled(1, 10, 90, np.float32)[..., 0]
    values[:20] = -9999
    (tmp_path / "dem.tif").write_bytes(tiff_of(values, nodata="-9999"))
    source = open_source(str(tmp_path))
    ((low, high),) = source.levels.ranges.values()
    assert 10 < low < high < 91
    assert (np.asarray(decode(source.path(0), levels=source.levels))[:20] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_lowest_number_of_a_type_means_that_nothing_was_measured(tmp_path, dtype):
    values = scaled(1, 10, 90, dtype)[..., 0]
    values[:20], values[-1] = np.finfo(np.float32).min, np.inf
    (tmp_path / "dem.tif").write_bytes(tiff_of(values))
    if dtype is np.float64:
        pytest.importorskip("tifffile")
    ((low, high),) = open_source(str(tmp_path)).levels.ranges.values()
    assert 10 < low < high < 91


def test_pictures_without_a_number_are_black(tmp_path):
    (tmp_path / "dem.tif").write_bytes(tiff_of(np.full((9, 9), np.nan, np.float32)))
    source = open_source(str(tmp_path))
    assert (np.asarray(decode(source.path(0), levels=source.levels)) == 0).all()


REFUSED = {
    "five bands": (tiff_of(scaled(5, 0, 99, np.uint8)), "5 bands"),
    "eight planes": (tiff_of(scaled(8, 0, 99, np.uint16), separate=True), "8 bands"),
    "two bands": (tiff_of(scaled(2, 0, 99, np.uint8)), "2 bands"),
    "planes of 16 bits": (tiff_of(scaled(3, 0, 99, np.uint16), photometric=2, separate=True), "install tifffile"),
    "floating colours": (tiff_of(ramps(3).astype(np.float32), photometric=2), "install tifffile"),
    "64 bits": (tiff_of(ramps(1)[..., 0]), "install tifffile"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_right_is_refused_by_its_reason(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    data, reason = REFUSED[name]
    for reader in (read_header, decode):
        with pytest.raises(BadImageError, match=reason) as error:
            reader(data, "it.tif")
        assert len(str(error.value)) <= 300


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize(
    ("bands", "more"),
    [
        (1, {}),
        (1, {"photometric": 0}),
        (2, {"alpha": True}),
        (3, {"photometric": 2}),
        (3, {"photometric": 2, "separate": True}),
    ],
)
def test_with_tifffile_all_types_and_layouts_are_exact(order, dtype, bands, more):
    pytest.importorskip("tifffile", reason="tifffile is missing: pip install tifffile imagecodecs")
    values = scaled(bands, 0, 100, dtype)
    values = values[..., 0] if bands == 1 else values
    data = tiff_of(values, order=order, orientation=6, **more)
    assert read_header(data) == (WIDTH, HEIGHT, ODD)
    shown = np.asarray(decode(data, levels=Levels("0..200")))
    levels = expected(values[..., 0] if bands == 2 else values, 0, 200 if dtype != "u1" else 255)
    assert np.abs(shown.astype(int) - np.rot90(255 - levels if more.get("photometric") == 0 else levels, -1)).max() <= 1


def test_a_scan_keeps_them_and_finds_their_ranges(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_unscanned(str(folder), "SRC")
    path = scan_manifest.default_path(cache_folder(folder))
    rows = scan.scan(source, path, workers=0)
    found = {row.name.decode().replace(".pgm.png", ".pgm"): row.verdict for row in rows}
    assert {found[name] for name in ("grey.png", "colour.png", "hounsfield.tif")} == {"16-bit"}
    assert (found["counts.tif"], found["zero to one.tif"]) == ("32-bit", "float")
    assert not set(found.values()) - set(scan_manifest.DEEPER)
    ranges = json.loads(range_file(path).read_text())
    assert open_source(str(folder)).levels.ranges == {kind: tuple(ends) for kind, ends in ranges.items()}
    assert ranges.keys() == {kind for _, _, kind in FILES.values()}


def test_a_run_writes_its_ranges_and_a_resume_keeps_them(tiny, folder, tmp_path, capsys):
    """And those of the training images are those of validation, whatever values it has."""
    train, val = tmp_path / "train", tmp_path / "val"
    for root, top in ((train, 4095), (val, 500)):
        for name in ("a", "b"):
            (root / name).mkdir(parents=True)
            for number in range(4):
                (root / name / f"{number}.png").write_bytes(png(scaled(1, 0, top - 9 * number, np.uint16)))
    config = load_config("quickstart", tiny(f"data.train={train}", f"data.val={val}", "data.backend=pil"))
    with opened(config) as (parts, _):
        data = parts.data
        ((kind, (low, high)),) = data.source.levels.ranges.items()
        assert kind == "16-bit PNG"
        assert 0 < low < 150
        assert 3900 < high < 4095
        assert data.val.levels == data.source.levels
        environment = json.loads((tmp_path / "runs/run/environment.json").read_text())
    assert environment["deep_pixels"]["train_images"] == {kind: [low, high]}
    assert f"deep      8 of 8 images with more than 8 bits: {kind}" in capsys.readouterr().out
    other = dataclasses.replace(data.source, levels=Levels("scale", {kind: (0.0, 1.0)}))
    first, second = with_levels(World(), tmp_path / "runs/run", other, other)
    assert first.levels.ranges == second.levels.ranges == {kind: (low, high)}
    assert with_levels(World(), None, other, None) == [other, None]
    # A run of a version that knew the range of the type only.
    del environment["deep_pixels"]
    (tmp_path / "runs/run/environment.json").write_text(json.dumps(environment))
    assert with_levels(World(), tmp_path / "runs/run", other, None)[0].levels == Levels("type")


def test_a_sample_is_the_same_at_every_start(folder):
    source = open_source(str(folder))
    assert measured(source, list(range(len(source)))) == source.levels.ranges
