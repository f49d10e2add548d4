"""Pixels and EXIF blocks made on the spot."""

import struct

import numpy as np
import torch
from PIL import Image


def smooth(generator, mode="RGB", size=(90, 60)):
    bands = [generator.integers(0, 256, (6, 6), np.uint8) for _ in mode]
    resized = [Image.fromarray(band).resize(size, Image.Resampling.BICUBIC) for band in bands]
    return Image.merge(mode, resized) if len(mode) > 1 else resized[0]


def exif_block(order, kind, orientation):
    """An EXIF block with an orientation as a number of 16 (kind 3) or 32 bits (kind 4)."""
    start = {"<": b"II", ">": b"MM"}[order]
    entry = struct.pack(order + "HHI" + ("HH" if kind == 3 else "I"), 0x0112, kind, 1, orientation, *[0] * (kind == 3))
    return b"Exif\0\0" + start + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4)


def pictures(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
