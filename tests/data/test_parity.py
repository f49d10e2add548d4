"""Every backend against PIL's, which is the truth: the same order and boxes, and how far its pixels may be off."""

import dataclasses
import functools
import json
import struct
from importlib.metadata import version

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from fastsiam.config import load_config
from fastsiam.data import rng
from fastsiam.data.backends.base import CropRequest
from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import EvaluationLoader
from fastsiam.data.sources.image_header import ODD, PLAIN
from fastsiam.data.sources.open import open_source
from fastsiam.train import opened as opened_run
from tests.support.ffcv_files import beton_of
from tests.support.images import exif_block, smooth
from tests.support.loaders import CPU, SIZE, SPEC, make


def opened(backend, source):
    """The backend for a batch of all images."""
    return open_backend(backend, source, (SIZE,), len(source), 0 if backend == "pil" else 1, CPU)


def made_of(backend, root, **options):
    """A loader of the images of a folder; .betons hold pixels."""
    return make(beton_of(root, "raw") if backend == "ffcv" else root, backend, **options)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"quality": 90, "exif": exif}


def late_exif(path):
    """Move a PNG's EXIF chunk behind its pixels."""
    data = path.read_bytes()
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4])
    path.write_bytes(data[:begin] + data[end:-12] + data[begin:end] + data[-12:])


def sixteen_bits(path):
    """A BMP of five, six and five bits a channel, from one of eight each."""
    pixels = np.asarray(Image.open(path)).astype(np.uint16) >> [3, 2, 3]
    packed = (pixels << [11, 5, 0]).sum(2).astype("<u2")[::-1]
    height, width = packed.shape
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, packed.nbytes, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 66 + packed.nbytes, 0, 0, 66) + head + masks + packed.tobytes())


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
# Kind of file: how it is written, and whether every decoder may be asked for it.
KINDS = {
    "plain.jpg": ("RGB", {"quality": 90}, PLAIN),
    "full chroma.jpg": ("RGB", {"quality": 90, "subsampling": "4:4:4"}, PLAIN),
    "half chroma.jpg": ("RGB", {"quality": 90, "subsampling": "4:2:2"}, PLAIN),
    "grey.jpg": ("L", {"quality": 90}, PLAIN),
    "progressive.jpg": ("RGB", {"quality": 90, "progressive": True}, PLAIN),
    "stored as RGB.jpg": ("RGB", {"quality": 90, "keep_rgb": True}, ODD),
    "cmyk.jpg": ("CMYK", {"quality": 90}, ODD),
    **{f"turned {number}.jpg": ("RGB", turned(number), PLAIN) for number in range(1, 9)},
    "grey and turned.jpg": ("L", turned(6), PLAIN),
    "turned by xmp.jpg": ("RGB", {"quality": 90, "xmp": XMP % 6}, ODD),
    "turned, 16 bits.jpg": ("RGB", {"quality": 90, "exif": exif_block(">", 3, 2)}, PLAIN),
    "turned, 32 bits.jpg": ("RGB", {"quality": 90, "exif": exif_block(">", 4, 2)}, ODD),
    "plain.png": ("RGB", {}, PLAIN),
    "grey.png": ("L", {}, PLAIN),
    "sixteen bits.png": ("I;16", {}, ODD),
    "palette.png": ("P", {}, ODD),
    "rgba.png": ("RGBA", {}, ODD),
    "turned.png": ("RGB", {"exif": turned(6)["exif"]}, ODD),
    "turned late.png": ("RGB", {"exif": turned(2)["exif"]}, ODD),
    "plain.webp": ("RGB", {"quality": 90}, PLAIN),
    "plain.bmp": ("RGB", {}, PLAIN),
    "sixteen bits.bmp": ("RGB", {}, ODD),
    "plain.tif": ("RGB", {}, ODD),
    "one pixel.jpg": ("RGB", {"quality": 90}, PLAIN),
    "long.jpg": ("RGB", {"quality": 90}, PLAIN),
    "animation, misnamed.png": ("P", {"format": "GIF", "save_all": True}, ODD),
}
SIZES = {"one pixel.jpg": (1, 1), "long.jpg": (12_000, 10)}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A source with a file of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    generator = np.random.default_rng(0)
    for name, (mode, options, _) in KINDS.items():
        if mode == "I;16":
            image = Image.fromarray(np.asarray(smooth(generator, "L")).astype(np.uint16) * 257)
        elif mode == "P":
            image = smooth(generator).quantize(32)
        else:
            image = smooth(generator, mode, SIZES.get(name, (90, 60)))
        if "save_all" in options:
            options = {**options, "append_images": [smooth(generator).quantize(32)]}
        image.save(root / name, **options)
    late_exif(root / "turned late.png")
    sixteen_bits(root / "sixteen bits.bmp")
    source = open_source(str(root))
    source.look(np.arange(len(source)))
    return source


def place(source, name):
    return [bytes(each) for each in source.names].index(name.encode())


@pytest.fixture(scope="module")
def crops_of(kinds):
    """Crops [E, V, N, S, S, 3] of all kinds, with the boxes of some epochs, by the name of a backend."""

    @functools.cache
    def crops(backend):
        everything = np.arange(len(kinds))
        sizes = kinds.sizes(everything)
        requests = []
        for epoch in range(8):
            boxes = [rng.crop_boxes(SPEC, 0, epoch, everything, view, sizes) for view in (0, 1)]
            requests.append(CropRequest(everything, (np.stack(boxes),), sizes))
        decoder = opened(backend, kinds)
        found = torch.stack([crops for _, (crops,) in decoder.crops(requests)])
        decoder.close()
        return found.view(8, 2, len(kinds), SIZE, SIZE, 3).float()

    return crops


@pytest.mark.parametrize("name", KINDS)
def test_the_header_tells_what_every_decoder_reads_alike(kinds, name):
    assert kinds.kinds[place(kinds, name)] == KINDS[name][2]


@pytest.mark.parametrize("name", KINDS)
def test_dalis_crops_of_each_kind_of_file_are_pils(kinds, crops_of, name):
    """Levels of 255: one for the filter's rounding, one for another JPEG decoder; measured 1 and 0.08 to 0.16."""
    row = place(kinds, name)
    difference = (crops_of("dali")[:, :, row] - crops_of("pil")[:, :, row]).abs()
    assert difference.max() <= 2
    assert difference.mean() < 0.3


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Pictures whose red is the column and whose green is the row, and half of them turned by EXIF."""
    root = tmp_path_factory.mktemp("maps")
    for number in range(8):
        height, width = 100 + 20 * number, 240 - 10 * number
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        shown = Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], 2))
        if number % 2:
            stored = shown.transpose(Image.Transpose.ROTATE_90)
            stored.save(root / f"{number}.jpg", **{**turned(6), "quality": 100, "subsampling": "4:4:4"})
        else:
            shown.save(root / f"{number}.png")
    return root


def boxes_seen(crops):
    """Top, left, height, width [B, 4] of crops of `maps`: the place is linear in the crop's pixel away from borders."""
    at = (np.arange(SIZE) + 0.5) / SIZE
    inside = slice(3, -3)
    found = []
    for crop in crops.numpy().astype(np.float64):
        (height, top), (width, left) = (
            np.polyfit(at[inside], crop[..., channel].mean(axis)[inside] + 0.5, 1) for channel, axis in ((1, 1), (0, 0))
        )
        found.append([top, left, height, width])
    return np.array(found)


@pytest.mark.parametrize("backend", ["dali", "pil", "ffcv", "resident"])
def test_the_same_seed_gives_the_same_order_and_boxes(maps, backend):
    """Boxes are read from the pixels of what was delivered: rounding them to levels costs up to a pixel and a half."""
    plain = dataclasses.replace(
        SPEC, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, mean=(0.0,) * 3, std=(1 / 255,) * 3, color="matrix"
    )
    made = made_of(backend, maps, spec=plain, batch_size=4, seed=3)
    for epoch in (0, 5):
        batches = list(made.epoch(epoch))
        indices = np.concatenate([batch.indices for batch in batches])
        assert indices.tolist() == rng.epoch_order(3, epoch, 8).tolist()
        for batch in batches:
            sizes = made.source.sizes(batch.indices)
            asked = [rng.crop_boxes(plain, 3, epoch, batch.indices, view, sizes) for view in (0, 1)]
            seen = boxes_seen(batch.views[0].permute(0, 2, 3, 1))
            assert np.abs(seen - np.concatenate(asked)).max() < 1.5
    made.close()


@functools.cache
def statistics(backend, color, root):
    """Mean [3] and covariance [3, 3] of the pixels of 2,048 views."""
    made = made_of(backend, root, spec=dataclasses.replace(SPEC, size=16, color=color), batch_size=16, seed=1)
    views = torch.cat([batch.views[0] for epoch in range(64) for batch in made.epoch(epoch)])
    made.close()
    assert len(views) == 2048
    pixels = views.permute(1, 0, 2, 3).reshape(3, -1).double()
    return pixels.mean(1), torch.cov(pixels)


@pytest.mark.parametrize("backend", ["dali", "ffcv", "resident"])
@pytest.mark.parametrize("color", ["matrix", "exact"])
def test_delivered_pixels_have_pils_mean_and_covariance(photos, backend, color):
    """In units of the normalised pixel, where a level of 255 is 0.02; measured 0.00003 and 0.0001.

    Resident's pixels have been through a filter once more, on their way into the store: measured 0.0002 and 0.002.
    """
    mean, covariance = statistics(backend, color, photos)
    expected_mean, expected_covariance = statistics("pil", color, photos)
    bound = 0.005 if backend == "resident" else 0.0005
    assert (mean - expected_mean).abs().max() < bound
    assert (covariance / expected_covariance - 1).abs().max() < bound
    assert covariance.diagonal().min() > 0.3


@pytest.mark.parametrize("backend", ["dali", "pil"])
def test_evaluation_decodes_as_training_does(kinds, backend):
    """The same box of the same file, asked for by training and by evaluation, bit for bit."""
    everything = np.arange(len(kinds))
    decoder = opened(backend, kinds)
    plain = dataclasses.replace(SPEC, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    made = EvaluationLoader(kinds, plain, decoder, batch_size=len(kinds), crop_ratio=0.8, dtype=torch.float32)
    (batch,) = made.batches()
    sizes = kinds.sizes(everything)
    request = CropRequest(everything, (rng.center_boxes(sizes, 0.8)[None],), sizes)
    ((_, (crops,)),) = opened(backend, kinds).crops([request])
    assert (batch.images.permute(0, 2, 3, 1).round() == crops).all()
    decoder.close()


# What the first words of a backend's description are, and what else names its decoder.
DECODERS = {
    "dali": lambda: (f"dali {dali_version()}", "nvimgcodec "),
    "pil": lambda: (f"pil {PIL.__version__}", "libjpeg"),
    "ffcv": lambda: (f"ffcv {version('ffcv')}", "JPEG"),
    "resident": lambda: ("resident", f"decoded by dali {dali_version()} on cpu"),
}


def dali_version():
    import nvidia.dali

    return nvidia.dali.__version__


@pytest.mark.parametrize("backend", DECODERS)
def test_the_decoder_and_its_version_stand_in_the_environment(tiny, tmp_path, demo_folder, backend):
    """That of training, which is that of validation too."""
    begin, decoder = DECODERS[backend]()
    overrides = tiny(f"data.backend={backend}", "data.workers=1", "data.store_size=32")
    if backend == "ffcv":
        overrides += [f"data.{part}={beton_of(demo_folder / part, 'jpg').root}" for part in ("train", "val")]
    with opened_run(load_config("quickstart", overrides)) as (parts, _):
        online = parts.evaluation._online
        told = json.loads((tmp_path / "runs/run/environment.json").read_text())["loader"]
        train, val = (loader.backend.description for loader in (online._train, online._val))
    assert train == told
    assert told.startswith(begin)
    for text in (told, val):
        assert text.split(" (")[0] == told.split(" (")[0]
        assert decoder in text
