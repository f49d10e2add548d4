"""Files written whole or not at all, on a disk that may be full for a while; JSON lines and arrays read back."""

import contextlib
import errno
import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

# What zipfile raises for damaged bytes: they may spell another compression, a password, a name that is no UTF-8.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)


def check_records(archive: zipfile.ZipFile) -> None:
    """Raises one of `DAMAGED_ZIP` where a record is not what was written; torch.load does not compare the CRC-32."""
    if record := archive.testzip():
        raise zipfile.BadZipFile(f"the CRC-32 of {record!r} is another")


class Appender:
    """Appends whole records to a file, or nothing of a record; those not written yet are `pending`, in order."""

    def __init__(self, path: Path):
        self._path = path
        self.pending: list[bytes] = []
        self._whole: int | None = None

    def flush(self) -> OSError | None:
        """Write the pending records, as many as the disk takes; returns why one was not."""
        try:
            while self.pending:
                self._write(self.pending[0])
                del self.pending[0]
        except OSError as error:
            return error
        return None

    def size(self) -> int:
        """Bytes of the whole records in the file."""
        if self._whole is not None:
            return self._whole
        return self._path.stat().st_size if self._path.exists() else 0

    def sync(self) -> None:
        if self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def _write(self, data: bytes) -> None:
        with open(self._path, "ab", buffering=0) as file:
            self._cut_back(file)
            self._whole = os.fstat(file.fileno()).st_size
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                # Where this fails too, the next write begins with it.
                with contextlib.suppress(OSError):
                    self._cut_back(file)
                raise
        self._whole = None

    def _cut_back(self, file: BinaryIO) -> None:
        """Take away what a failed write has left of its record."""
        if self._whole is not None and os.fstat(file.fileno()).st_size > self._whole:
            file.truncate(self._whole)


def replace_file(path: Path, data: bytes, suffix: str = ".tmp") -> None:
    """Replace a file by a whole one; where that fails (`OSError`), the old one stays and nothing lies beside it."""
    temporary = path.with_name(f"{path.name}{suffix}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder and answer with one of these (PostgreSQL, fd.c: fsync_fname_ext).
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def json_lines(data: bytes) -> list[dict]:
    """The lines that are JSON objects; the last one of a run that is writing may not be."""
    found = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def read_json(path: Path) -> dict:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replace `path` by an .npz of named arrays without pickles; raises `OSError` where the disk refuses."""
    assert not any(array.dtype.hasobject for array in arrays.values())
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    replace_file(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays that `write_arrays` has written; empty where there is no file, or where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, *DAMAGED_ZIP):
        return {}
