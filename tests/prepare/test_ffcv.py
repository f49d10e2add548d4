"""What prepare ffcv writes: every image's displayed RGB at its index, and what runs need to know of the originals."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.data.backends.choose import open_backend
from fastsiam.data.decode import decode_image
from fastsiam.data.sources.beton import index_path
from fastsiam.data.sources.image_header import PLAIN, UNREADABLE, UNWANTED
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.prepare import __main__ as prepare
from fastsiam.prepare.ffcv import write_beton
from tests.support.ffcv_files import beton_of, stored_images
from tests.support.refusals import refused, refuses


def odd_files(folder):
    """Files that decoders disagree about, a good one and a bad one, without labels."""
    generator = np.random.default_rng(1)
    grey = generator.integers(0, 256, (20, 30), np.uint8)
    picture = Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    folder.mkdir()
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "seen_through.png")
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "turned.png", exif=exif)
    picture.save(folder / "webp.webp", lossless=True)
    (folder / "junk.jpg").write_bytes(b"no picture")


def test_a_beton_holds_the_displayed_rgb_of_every_image_at_its_index(tmp_path, capsys):
    odd_files(tmp_path / "odd")
    path = tmp_path / "odd.beton"
    assert prepare.main(["ffcv", str(tmp_path / "odd"), str(path), "--max-side", "32", "--format", "raw"]) == 0
    told = capsys.readouterr()
    assert f"7 images (1 excluded) are in {path}" in told.out
    assert f"excluded  {tmp_path}/odd/junk.jpg " in told.out
    original, source = open_source(str(tmp_path / "odd")), open_source(str(path))
    assert source.names.tolist() == original.names.tolist()
    stored, labels = stored_images(path)
    assert labels.tolist() == source.labels.tolist() == [-1] * 8
    for index, (_, pixels) in enumerate(stored):
        if original.names[index] == b"junk.jpg":
            assert source.kinds[index] == UNREADABLE
            continue
        assert source.kinds[index] == PLAIN
        assert (pixels == np.asarray(decode_image(original, index))).all()
        assert source.image_sizes[index].tolist() == list(pixels.shape[:2])
        assert source.file_sizes[index] == pixels.size


def test_labels_classes_and_sizes_before_shrinking_go_with_it(photos):
    original, source = open_source(str(photos)), beton_of(photos, "jpg", 50, 90)
    assert source.classes == original.classes == ("class0", "class1", "class2", "class3")
    assert source.labels.tolist() == original.labels.tolist() == stored_images(source.root)[1].tolist()
    assert source.image_sizes.tolist() == original.sizes(np.arange(16)).tolist()
    assert source.name(3) == f"{source.root}/{os.fsdecode(bytes(original.names[3]))}"
    for (record, _), size in zip(stored_images(source.root)[0], source.image_sizes, strict=True):
        # ffcv cuts the fraction off, and 50 pixels may become 49 so.
        lost = size * min(1, 50 / size.max()) - [record["height"], record["width"]]
        assert ((lost > -1e-6) & (lost < 1 + 1e-6)).all()
    assert source.fingerprint() != beton_of(photos, "jpg").fingerprint()


def test_mixed_is_a_fixed_half_of_each(photos, tmp_path):
    modes = [int(record["mode"]) for record, _ in stored_images(beton_of(photos, "mixed").root)[0]]
    assert sum(modes) == 8
    assert modes not in ([0] * 8 + [1] * 8, [1] * 8 + [0] * 8)
    again = tmp_path / "again.beton"
    write_beton(open_source(str(photos)), again, max_side=4096, stored_as="mixed", quality=95, threads=5)
    assert again.read_bytes() == beton_of(photos, "mixed").root.read_bytes()


def test_images_that_the_source_excludes_are_excluded(photos, tmp_path):
    original = open_source(str(photos))
    original.mark([2, 7], (UNWANTED, UNREADABLE))
    assert write_beton(original, tmp_path / "x.beton") == {}
    assert open_source(str(tmp_path / "x.beton")).kinds.tolist() == [
        {2: UNWANTED, 7: UNREADABLE}.get(index, PLAIN) for index in range(16)
    ]


def test_a_stopped_writer_leaves_no_file(photos, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(open_source(str(photos)), tmp_path / "x.beton", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "out", "options", "key", "code"),
    [
        ("photos", "x.bin", [], "OUT", "bad-name"),
        ("photos", "there.beton", [], "OUT", "exists"),
        ("photos", "no/x.beton", [], "OUT", "no-folder"),
        ("photos", "x.beton", ["--max-side", "0"], "--max-side", "out-of-range"),
        ("photos", "x.beton", ["--quality", "101"], "--quality", "out-of-range"),
        ("nowhere", "x.beton", [], "SRC", "absent"),
        ("there.beton", "x.beton", [], "SRC", "is-beton"),
    ],
)
def test_wrong_arguments_are_refused(photos, tmp_path, source, out, options, key, code):
    (tmp_path / "there.beton").touch()
    error = refused("prepare", "ffcv", photos if source == "photos" else tmp_path / source, tmp_path / out, *options)
    assert (error.key, error.code) == (key, code)


def test_a_beton_without_its_index_cut_short_or_of_another_one_is_refused(photos, tmp_path):
    source = beton_of(photos, "jpg")
    path = tmp_path / "x.beton"
    with refuses("no-beton", "data.train"):
        open_source(str(path))
    shutil.copy(source.root, path)
    with refuses("no-beton", "data.train"):
        open_source(str(path))
    index_path(path).write_bytes(b"nothing")
    with refuses("bad-beton", "data.train"):
        open_source(str(path))
    shutil.copy(index_path(source.root), index_path(path))
    os.truncate(path, path.stat().st_size - 24)
    with pytest.raises(UserError, match="holds 16 images, 15 of them whole"):
        open_backend("ffcv", open_source(str(path)), (24,), 5, 1, torch.device("cpu"))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a .beton"):
        open_backend("ffcv", open_source(str(path)), (24,), 5, 1, torch.device("cpu"))
