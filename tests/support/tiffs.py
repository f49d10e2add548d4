"""TIFFs as the format says, for what no library that the tests need can write."""

import struct

import numpy as np

_FORMATS = {"u": 1, "i": 2, "f": 3}


def tiff_of(values, *, order="<", photometric=1, separate=False, alpha=False, nodata=None, orientation=1):
    """An uncompressed TIFF of values [H, W] or [H, W, bands]; `separate`: a plane for each band."""
    bands = 1 if values.ndim == 2 else values.shape[2]
    height, width = values.shape[:2]
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    planes = [values[..., band] for band in range(bands)] if separate and bands > 1 else [values]
    planes = [np.ascontiguousarray(plane).astype(values.dtype.newbyteorder(order)).tobytes() for plane in planes]
    offsets, place = [], 8
    for plane in planes:
        offsets.append(place)
        place += len(plane) + len(plane) % 2
    tags = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * bands),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", offsets),
        274: ("H", [orientation]),
        277: ("H", [bands]),
        278: ("I", [height]),
        279: ("I", [len(plane) for plane in planes]),
        284: ("H", [2 if separate else 1]),
        339: ("H", [_FORMATS[kind]] * bands),
    }
    if alpha:
        tags[338] = ("H", [2])
    if nodata is not None:
        tags[42113] = ("s", [nodata.encode() + b"\0"])
    entries, behind = b"", b""
    after = place + 2 + 12 * len(tags) + 4
    for tag, (letter, numbers) in sorted(tags.items()):
        count = len(numbers[0]) if letter == "s" else len(numbers)
        data = struct.pack(f"{order}{count}{letter}", *numbers)
        if len(data) > 4:
            behind, data = behind + data + b"\0" * (len(data) % 2), struct.pack(order + "I", after + len(behind))
        entries += struct.pack(order + "HHI", tag, {"H": 3, "I": 4, "s": 2}[letter], count) + data.ljust(4, b"\0")
    pixels = b"".join(plane + b"\0" * (len(plane) % 2) for plane in planes)
    mark = b"II" if order == "<" else b"MM"
    directory = struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0) + behind
    return mark + struct.pack(order + "HI", 42, place) + pixels + directory
