"""Writer of a source of images as one file for ffcv, and of the index beside it.

`OUT.beton` holds image i of the source as its sample i: RGB as displayed, its longest side shrunk to `max_side`, as
JPEG or as pixels, with its label (-1 without). `OUT.beton.npz` is the index that `data/sources/beton.py` reads. An
image that cannot be decoded keeps its place, as one black pixel, and is marked as excluded, like those that the source
excludes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsiam.data import rng
from fastsiam.data.sources.beton import ARRAYS, SUFFIX, index_path, is_beton
from fastsiam.data.sources.image_header import PLAIN, UNREADABLE, BadImageError
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.runtime.cores import usable_cores

FORMATS = ("jpg", "raw", "mixed")
# As ffcv-imagenet writes ImageNet for ResNet-50 (write_imagenet.sh 500 0.50 90): longest side 500, half of the images
# as JPEG of quality 90, the others as pixels.
MAX_SIDE, FORMAT, QUALITY = 500, "mixed", 90
# A page holds the largest image as pixels, and the writer holds a page in memory: 64 MiB at this side.
LARGEST_SIDE = 4096

_SMALLEST_PAGE = 1 << 23


class _Sample(NamedTuple):
    record: np.ndarray
    """[1], ffcv's record of the image, without the place of its bytes."""
    stored: np.ndarray
    """Those bytes, uint8."""
    size: tuple[int, int]
    """Height and width before shrinking; of the black pixel for a bad file."""
    bad: str | None


def write_beton(
    source: ImageSource,
    path: Path,
    *,
    max_side: int = MAX_SIDE,
    stored_as: str = FORMAT,
    quality: int = QUALITY,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, str]:
    """Writes every image of `source` to `path`, and the index beside it; returns the reasons of bad files, by index.

    `max_side`: pixels, up to 4096. Smaller images stay as they are, larger ones are shrunk by OpenCV's area filter.
    `stored_as`: jpg, raw (pixels), or mixed, a fixed random half of each. `quality`: of JPEG, 1 to 100.
    `progress(done, total)` is called after every image. Raises `UserError` for a setting out of range, a name that does
    not end in .beton, a file that exists, and where no image can be decoded; `MissingLibraryError` without ffcv.
    """
    _check(path, max_side, stored_as, quality)
    in_jpeg = np.full(len(source), stored_as != "raw")
    if stored_as == "mixed":
        in_jpeg[rng.probe_indices(0, len(source), len(source) // 2)] = False
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        encoder = _Encoder(source, in_jpeg, max_side, quality)
        image_sizes, stored, bad = _write(encoder, source.labels, unfinished, threads or usable_cores(), progress)
        if len(bad) == len(source):
            raise UserError(f"SRC: none of the {len(source)} images under {source.root} can be decoded", "none-decodes")
        kinds = np.where(source.kinds >= UNREADABLE, source.kinds, PLAIN).astype(np.uint8)
        kinds[list(bad)] = UNREADABLE
        arrays = (source.names, stored, source.labels, np.array(source.classes, str), image_sizes, kinds)
        np.savez(index_path(path), **dict(zip(ARRAYS, arrays, strict=True)))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return bad


def _check(path, max_side, stored_as, quality):
    if not is_beton(path):
        raise UserError(f"OUT: {path} does not end in {SUFFIX}; write to {path}{SUFFIX}", "bad-name")
    if path.exists():
        raise UserError(f"OUT: {path} exists; remove it, or write to another name", "exists")
    if not path.parent.is_dir():
        raise UserError(f"OUT: there is no folder {path.parent}; make it first", "no-folder")
    if not 1 <= max_side <= LARGEST_SIDE:
        raise UserError(f"--max-side: {max_side} is not between 1 and {LARGEST_SIDE} pixels", "out-of-range")
    if stored_as not in FORMATS:
        raise UserError(f"--format: {stored_as} is not one of {', '.join(FORMATS)}", "bad-value")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality: {quality} is not between 1 and 100", "out-of-range")


def _write(encoder, labels, path, threads, progress):
    """Writes samples by the parts of ffcv's writer. Its own loop forks processes and hangs where one of them dies."""
    from fastsiam.data.backends.ffcv_imports import DatasetWriter, IntField, MemoryAllocator

    page = max(_SMALLEST_PAGE, 1 << (3 * encoder.max_side**2 - 1).bit_length())
    writer = DatasetWriter(str(path), {"image": encoder.fields[True], "label": IntField()}, page, num_workers=1)
    writer.num_samples = count = len(labels)
    writer.prepare()
    image_sizes, stored, bad = np.zeros((count, 2), np.int32), np.zeros(count, np.int64), {}
    try:
        metadata = np.zeros(count, writer.metadata_type)
        metadata["f1"] = labels
        allocator = MemoryAllocator(str(path), writer.data_region_start, page)
        with allocator:
            for index, sample in enumerate(_in_order(encoder, count, threads)):
                allocator.set_current_sample(index)
                sample.record["data_ptr"], storage = allocator.malloc(len(sample.stored))
                storage[:] = sample.stored
                metadata["f0"][index] = sample.record[0]
                image_sizes[index], stored[index] = sample.size, len(sample.stored)
                if sample.bad:
                    bad[index] = sample.bad
                progress(index + 1, count)
        writer.metadata_sm.buf[:] = metadata.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    return image_sizes, stored, bad


def _in_order(encode, count, threads) -> Iterator[_Sample]:
    """Yields samples 0 to `count`, encoded in threads; PIL and OpenCV release the interpreter lock."""
    ahead = deque()
    with ThreadPoolExecutor(threads) as pool:
        for index in range(count):
            ahead.append(pool.submit(encode, index))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Encoder:
    """Encoder of an image that PIL decodes, by ffcv's field."""

    def __init__(self, source, in_jpeg, max_side, quality):
        from fastsiam.data.backends.ffcv_imports import RGBImageField

        self._source, self._in_jpeg, self.max_side = source, in_jpeg, max_side
        self.fields = {
            is_jpeg: RGBImageField(name, max_resolution=max_side, jpeg_quality=quality)
            for name, is_jpeg in (("jpg", True), ("raw", False))
        }

    def __call__(self, index: int) -> _Sample:
        from fastsiam.data.decode import decode_image

        try:
            pixels, bad = np.asarray(decode_image(self._source, index)), None
            short, long = sorted(pixels.shape[:2])
            if long > self.max_side and short * self.max_side <= long:
                raise BadImageError(f"{self._source.name(index)} is too narrow to be shrunk to {self.max_side} pixels")
        except BadImageError as error:
            pixels, bad = np.zeros((1, 1, 3), np.uint8), str(error)
        field = self.fields[bool(self._in_jpeg[index])]
        record, stored = np.zeros(1, field.metadata_type), []

        def malloc(size):
            stored.append(np.empty(size, np.uint8))
            return 0, stored[0]

        field.encode(record, pixels, malloc)
        return _Sample(record, stored[0], pixels.shape[:2], bad)
