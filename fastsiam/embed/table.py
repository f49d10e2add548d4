"""Tables of features, names and labels as .npz, .parquet or .safetensors.

| | .npz | .parquet | .safetensors |
|---|---|---|---|
| features [N, D] | `features` | column `features`, lists of one length | `features` |
| names | `names`, strings | column `name` | `names`, UTF-8 bytes, a line each |
| labels | `labels` [N] int64, -1 for none | column `label` | `labels` |
| class names | `classes` [C] | in the schema's metadata | in the metadata |
| description | `description`, JSON | metadata `fastsiam` | metadata `fastsiam` |
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import MissingLibraryError, UserError, printable
from fastsiam.runtime.files import DAMAGED_ZIP

# Rows in one piece of a .parquet: with 2,048 features in fp32 67 MB.
_ROWS = 8192


@dataclass(frozen=True)
class Table:
    """Features of N images in the order of their source."""

    features: np.ndarray
    """[N, D] float16 or float32."""
    names: np.ndarray
    """[N] str, relative to the source; bytes that are not UTF-8 as \\xNN."""
    labels: np.ndarray
    """[N] int64; -1 without a label."""
    classes: list[str]
    """Class names by label."""
    description: dict
    """Encoder and how it was fed, as in encoder.safetensors, with `identity` and `source`."""


def table_of(source: ImageSource, indices: np.ndarray, features: np.ndarray, description: dict) -> Table:
    """The table of the images `indices` of a source; images that cannot be decoded are not among them."""
    names = np.array([printable(os.fsdecode(bytes(source.names[index]))) for index in indices])
    return Table(features, names, source.labels[indices], list(source.classes), description)


def check_writable(path: Path) -> None:
    """Raises `UserError` where `path` could not be written, or its library is missing."""
    if path.suffix == ".parquet":
        _pyarrow()
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out: the folder {path.absolute().parent} cannot be written", "out-unwritable")


def write_table(path: Path, table: Table) -> None:
    """Writes a table whole or not at all; raises `UserError` where the disk refuses."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        _WRITERS[path.suffix](temporary, table)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out: cannot write {path} ({reason})", "out-unwritable") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> Table:
    """Reads what `write_table` has written; raises `UserError` for another file."""
    try:
        return _READERS[path.suffix](path)
    except (OSError, SafetensorError, KeyError, *DAMAGED_ZIP) as error:
        text = f"--out: {path} is there and holds no features ({error}); delete it, or choose another file"
        raise UserError(text, "not-features") from error


def _write_npz(path, table):
    with open(path, "wb") as file:
        np.savez(
            file,
            features=table.features,
            names=table.names,
            labels=table.labels,
            classes=np.array(table.classes, dtype=str),
            description=np.array(json.dumps(table.description)),
        )


def _read_npz(path):
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    said = json.loads(str(arrays["description"]))
    return Table(arrays["features"], arrays["names"], arrays["labels"], arrays["classes"].tolist(), said)


def _write_safetensors(path, table):
    names = np.frombuffer("\n".join(table.names.tolist()).encode(), np.uint8)
    arrays = {"features": np.ascontiguousarray(table.features), "labels": table.labels, "names": names}
    save_file(arrays, path, {"fastsiam": json.dumps(table.description), "classes": json.dumps(table.classes)})


def _read_safetensors(path):
    with safe_open(path, "numpy") as file:
        said = file.metadata() or {}
        features, labels, names = (file.get_tensor(name) for name in ("features", "labels", "names"))
    names = np.array(names.tobytes().decode().split("\n"))
    return Table(features, names, labels, json.loads(said["classes"]), json.loads(said["fastsiam"]))


def _write_parquet(path, table):
    arrow, parquet = _pyarrow()
    width = table.features.shape[1]
    number = arrow.float16() if table.features.dtype == np.float16 else arrow.float32()
    said = {"fastsiam": json.dumps(table.description), "classes": json.dumps(table.classes)}
    fields = {"name": arrow.string(), "label": arrow.int64(), "features": arrow.list_(number, width)}
    schema = arrow.schema(fields, said)
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(table.names), _ROWS):
            rows = slice(start, start + _ROWS)
            flat = arrow.array(np.asarray(table.features[rows]).reshape(-1), number)
            columns = [table.names[rows].tolist(), table.labels[rows]]
            columns.append(arrow.FixedSizeListArray.from_arrays(flat, width))
            writer.write_table(arrow.table(columns, schema=schema))


def _read_parquet(path):
    arrow, parquet = _pyarrow()
    try:
        found = parquet.read_table(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(str(error)) from error
    said = {key.decode(): json.loads(value) for key, value in found.schema.metadata.items() if key != b"ARROW:schema"}
    features = found["features"].combine_chunks()
    flat = features.flatten().to_numpy(zero_copy_only=False)
    names = np.array(found["name"].to_pylist())
    rows = flat.reshape(len(names), -1)
    return Table(rows, names, found["label"].to_numpy(), said["classes"], said["fastsiam"])


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        text = "--out: .parquet needs pyarrow; pip install pyarrow, or write .npz or .safetensors"
        raise MissingLibraryError(text, "no-pyarrow", name="pyarrow") from error
    return pyarrow, pyarrow.parquet


_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
