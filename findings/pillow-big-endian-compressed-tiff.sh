#!/usr/bin/env bash
# Pillow 13 reads big-endian TIFFs of 32 bits a pixel with their bytes swapped where they are compressed (deflate, LZW),
# without an error. Uncompressed ones, those of 16 bits and little-endian ones are right. A CT or elevation model so
# written becomes noise; int32 and float32 alike.
#
# Seen on 2026-11-28, Python 3.11, x86-64:
#   Pillow 13.0.0, tifffile 2026.3.3, imagecodecs 2026.3.6
#   big-endian, not compressed, int32: [0, 1000, 2000]
#   big-endian, not compressed, float32: [0.0, 1000.0, 2000.0]
#   big-endian, zlib, int32: [0, -402456576, -804847616]
#   big-endian, zlib, float32: [0.0, 4.3860641933366774e-41, 8.977839001236238e-41]
#   big-endian, zlib, uint16: [0, 1000, 2000]
#   little-endian, zlib, int32: [0, 1000, 2000]
# Exits with 1 where that no longer holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6
"$work/venv/bin/python" - <<'P'
import io
import sys

import imagecodecs
import numpy as np
import PIL
import tifffile
from PIL import Image

print(f"Pillow {PIL.__version__}, tifffile {tifffile.__version__}, imagecodecs {imagecodecs.__version__}")
truth = (np.arange(64) * 1000).reshape(8, 8)


def read(order, compression, dtype):
    """Whether Pillow's pixels are those that were written."""
    file = io.BytesIO()
    tifffile.imwrite(file, truth.astype(dtype), byteorder=order, compression=compression, photometric="minisblack")
    file.seek(0)
    pixels = np.asarray(Image.open(file))
    name = "big-endian" if order == ">" else "little-endian"
    print(f"{name}, {compression or 'not compressed'}, {dtype}: {pixels[0, :3].tolist()}")
    return bool((pixels.astype(np.float64) == truth).all())


right = [read(">", None, "int32"), read(">", None, "float32")]
wrong = [read(">", "zlib", "int32"), read(">", "zlib", "float32")]
right += [read(">", "zlib", "uint16"), read("<", "zlib", "int32")]
sys.exit(0 if all(right) and not any(wrong) else 1)
P
