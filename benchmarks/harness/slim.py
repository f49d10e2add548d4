"""Smaller libraries for one GPU: `python benchmarks/harness/slim.py FILE ...` blanks unused CUDA code.

Of each file's section .nv_fatbin only machine code of CHIP stays; all other machine code and all PTX become zeros, the
length of nothing changes. A fat binary is a header (magic 0xBA55ED50, its own length, that of what follows) and
entries, each with kind (1 PTX, 2 machine code), header and payload lengths, and at byte 28 the chip.
"""

import struct
import sys
from pathlib import Path

MACHINE_CODE, CHIP = 2, 90
_MAGIC = 0xBA55ED50


def slim(data: bytearray, keep: tuple[int, int] = (MACHINE_CODE, CHIP)) -> int:
    """Blank in an ELF file in memory; returns the number of bytes blanked, 0 for anything else."""
    if data[:4] != b"\x7fELF":
        return 0
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
    blanked = 0
    for name, _, _, _, at, length in heads:
        start = heads[names][4] + name
        if data[start : data.index(b"\0", start)] == b".nv_fatbin":
            blanked += _blank(data, at, at + length, keep)
    return blanked


def _blank(data, at, end, keep):
    blanked = 0
    while at + 16 <= end:
        magic, _, skip, length = struct.unpack_from("<IHHQ", data, at)
        if magic != _MAGIC:
            # Padding between them.
            at += 8
            continue
        entry, last = at + skip, at + skip + length
        while entry + 32 <= last:
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, entry)
            (chip,) = struct.unpack_from("<I", data, entry + 28)
            if not 32 <= header <= 4096:
                break
            if (kind, chip) != keep:
                data[entry + header : entry + header + payload] = bytes(payload)
                blanked += payload
            entry += header + payload
        at = last
    return blanked


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        whole = bytearray(path.read_bytes())
        if slim(whole):
            path.write_bytes(whole)
