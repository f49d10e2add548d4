"""Scanner that decodes every image of a source once and records what is wrong with it."""

import hashlib
import json
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image

from fastsiam.data.decode import decode
from fastsiam.data.sources import scan_manifest
from fastsiam.data.sources.deep_pixels import UnsupportedError, kind_of, open_picture
from fastsiam.data.sources.formats import begins_as_image
from fastsiam.data.sources.image_header import ODD, UNKNOWN, UNREADABLE, BadImageError, read_header
from fastsiam.data.sources.pixel_range import measured, range_file
from fastsiam.data.sources.scan_manifest import VERDICTS, Row
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError

# Above twice its own limit Pillow refuses to decode, and so would a run.
PIXEL_LIMIT = 2 * Image.MAX_IMAGE_PIXELS
# Images that a worker takes at a time, and the most that are decoded again after a kill.
_CHUNK = 32
# Images of each kind whose values are measured again at the end.
_MEASURED = 256


def scan(
    source: ImageSource,
    path: Path,
    *,
    workers: int,
    max_pixels: int = PIXEL_LIMIT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Returns a row for each image, in the source's order; also writes them to the manifest `path`.

    Rows that `path` holds already for files of the same name and size are taken from there, unless they are bad.
    `workers`: processes, 0 for none. `progress(done, total)` is called after every image.
    """
    if not 0 < max_pixels <= PIXEL_LIMIT:
        raise UserError(f"--max-pixels: {max_pixels} is not from 1 to {PIXEL_LIMIT}, Pillow's limit", "out-of-range")
    scan_manifest.begin(path)
    known = {(row.name, row.file_size): row for row in scan_manifest.read_rows(path) if _still_holds(row, max_pixels)}
    keys = list(zip(source.names.tolist(), source.file_sizes.tolist(), strict=True))
    missing = [index for index, key in enumerate(keys) if key not in known]
    done = len(source) - len(missing)
    progress(done, len(source))
    with open(path, "ab") as file:
        for rows in _examined(source, missing, workers, max_pixels):
            file.writelines(row.line() for row in rows)
            file.flush()
            known |= {(row.name, row.file_size): row for row in rows}
            done += len(rows)
            progress(done, len(source))
    rows = _with_duplicates([known[key] for key in keys])
    scan_manifest.write_rows(path, rows)
    _write_ranges(source, rows, path)
    return rows


def _write_ranges(source, rows, path):
    """Writes the range of pixels with more than eight bits beside the manifest."""
    found = [index for index, row in enumerate(rows) if row.verdict in scan_manifest.DEEPER]
    if found:
        ranges = measured(source, found, most=_MEASURED)
        range_file(path).write_text(json.dumps(ranges, indent=1), encoding="utf-8")
    else:
        range_file(path).unlink(missing_ok=True)


def examine(source: ImageSource, index: int, max_pixels: int) -> Row:
    """Returns the row of one image; duplicates are found later."""
    name, file_size = bytes(source.names[index]), int(source.file_sizes[index])
    try:
        data = source.read(index)
    except BadImageError:
        return Row(name, file_size, 0, 0, scan_manifest.UNREAD, UNKNOWN, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = _judge(data, max_pixels)
    return Row(name, file_size, *found, hashlib.blake2b(data, digest_size=16).hexdigest())


def _judge(data, max_pixels):
    """Returns height, width, verdict and kind."""
    if not data:
        return 0, 0, scan_manifest.EMPTY, UNKNOWN
    try:
        header = read_header(data)
    except BadImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            return 0, 0, scan_manifest.TOO_LARGE, UNKNOWN
        if isinstance(error.__cause__, UnsupportedError):
            return 0, 0, scan_manifest.UNSUPPORTED, UNKNOWN
        return 0, 0, scan_manifest.TRUNCATED if begins_as_image(data) else scan_manifest.NOT_AN_IMAGE, UNKNOWN
    verdict = scan_manifest.TOO_LARGE
    if header.height * header.width <= max_pixels:
        try:
            verdict = _judge_picture(data, decode(data))
        except BadImageError:
            verdict = scan_manifest.TRUNCATED
    return header.height, header.width, verdict, header.kind


def _judge_picture(data, picture):
    if all(low == high for low, high in picture.getextrema()):
        return scan_manifest.CONSTANT
    with open_picture(data) as opened:
        mode = ""
        if (image := opened.image) is not None:
            mode = image.mode
            # The second picture of an MPO file is the other eye's, not a frame.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                return scan_manifest.ANIMATED
        if mode == "CMYK":
            return scan_manifest.CMYK
        if kind := kind_of(opened):
            words = {"float": scan_manifest.FLOAT, "32-bit": scan_manifest.WIDE}
            return next((verdict for word, verdict in words.items() if word in kind), scan_manifest.DEEP)
        return scan_manifest.GREYSCALE if mode in ("L", "LA", "1") else scan_manifest.OK


def _still_holds(row, max_pixels):
    """Returns False for bad files (may be repaired), duplicates (the first may be gone), and another size limit."""
    too_large = row.height * row.width > max_pixels
    bad = VERDICTS[row.verdict].kind == UNREADABLE
    # Manifests of 0.1.0 judge pixels of more than eight bits by the range of their type.
    bad |= row.verdict == scan_manifest.CONSTANT and row.kind == ODD
    return not bad and row.verdict != scan_manifest.DUPLICATE and too_large == (row.verdict == scan_manifest.TOO_LARGE)


def _with_duplicates(rows):
    seen = set()
    judged = []
    for row in rows:
        if VERDICTS[row.verdict].kind != UNREADABLE:
            if row.digest in seen:
                row = row._replace(verdict=scan_manifest.DUPLICATE)
            seen.add(row.digest)
        judged.append(row)
    return judged


def _examined(source, indices, workers, max_pixels) -> Iterator[list[Row]]:
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    if not workers or not chunks:
        for chunk in chunks:
            yield [examine(source, index, max_pixels) for index in chunk]
        return
    # A fork would copy the locks of threads that live in this process; preloaded, the workers import nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _adopt, (source, max_pixels)) as pool:
        try:
            yield from pool.map(_examine_chunk, chunks)
        except BrokenProcessPool:
            raise UserError(
                "scan: a worker process died, probably out of memory; start again with fewer --workers", "worker-died"
            ) from None


_adopted = None


def _adopt(source, max_pixels):
    global _adopted
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _adopted = source, max_pixels


def _examine_chunk(indices):
    source, max_pixels = _adopted
    return [examine(source, index, max_pixels) for index in indices]
