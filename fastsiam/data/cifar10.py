"""CIFAR-10 as folders of images, OUT/{train,val}/CLASS/..., from the archive of its authors or from images.

Source of the archive's format: https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 python version".
"""

import codecs
import hashlib
import io
import lzma
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from fastsiam.config import UserError
from fastsiam.data.files import EXTENSIONS
from fastsiam.data.shards import check_member

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
_MD5 = "c58f30108f718f92721af3b95e74349a"
_META = "batches.meta"
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "val": ("test_batch",)}
# What a pickle of arrays asks for; numpy has moved its module since the archive was written.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    # How Python 3 writes bytes in protocol 2.
    ("_codecs", "encode"): codecs.encode,
}
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_PARTS = {"train": "train", "test": "val", "val": "val"}
_EXPECTED = f"expected {ARCHIVE}, its folder {FOLDER}, or a folder or tar of images {{train,test}}/CLASS/IMAGE.jpg"


def convert(
    source: Path,
    out: Path,
    warn: Callable[[str], None],
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write OUT/{train,val}/CLASS/; returns how many images each part has.

    Arrays of the archive become PNG files named by their place in it, images keep their bytes and names; test becomes
    val. OUT is either absent or whole. `progress(done, total)` is told of every image, the total None where the archive
    would have to be read twice to know it. Raises `UserError` for other input, and where OUT exists.
    """
    if out.exists():
        raise UserError(f"cifar10: {out} exists; name a new folder, or delete this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "val": 0}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as partial:
        whole = Path(partial) / out.name
        images, total = _open(source, warn)
        for part, name, data in images:
            path = whole / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            counts[part] += 1
            progress(sum(counts.values()), total)
        if not all(counts.values()):
            missing = "train" if not counts["train"] else "test"
            raise UserError(f"cifar10: {source} has no {missing} images; {_EXPECTED}")
        classes = [sorted(path.name for path in (whole / part).iterdir()) for part in counts]
        if classes[0] != classes[1]:
            raise UserError(f"cifar10: in {source} the classes of train and test differ: {classes[0]} and {classes[1]}")
        whole.rename(out)
    return counts


def download(folder: Path) -> Path:
    """The authors' data, fetched and checked by torchvision into `folder`; raises `UserError` without a network."""
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cifar10: the archive cannot be downloaded ({error}); fetch {ARCHIVE} elsewhere and give its path: "
            "python -m fastsiam.prepare cifar10 SRC OUT"
        ) from error
    return folder / FOLDER


def load_batch(data: bytes, name: str) -> dict:
    """A pickled dict of plain values and arrays, by string keys; raises `UserError` for what asks for more."""
    try:
        batch = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"cifar10: {name} is no batch of CIFAR-10 ({error})") from error
    if not isinstance(batch, dict):
        raise UserError(f"cifar10: {name} is no batch of CIFAR-10 (it holds no dict)")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}


class _PlainUnpickler(pickle.Unpickler):
    """Makes numpy arrays, numbers, strings, lists and dicts; calls nothing else that a file names."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _open(source, warn) -> tuple[Iterator[tuple[str, str, bytes]], int | None]:
    """(part, CLASS/IMAGE, bytes) of every image, and how many there are."""
    if not source.exists():
        raise UserError(f"cifar10: there is no {source}; {_EXPECTED}")
    if source.is_dir():
        for folder in (source, source / FOLDER):
            if (folder / _META).exists():
                return _of_batches(lambda name, folder=folder: (folder / name).read_bytes(), folder)
        paths = [(path, _place(path.relative_to(source).as_posix())) for path in sorted(source.rglob("*"))]
        paths = [(path, place) for path, place in paths if place and path.is_file()]
        return ((*place, path.read_bytes()) for path, place in paths), len(paths)
    try:
        with tarfile.open(source) as tar:
            first = tar.next()
            if first is not None and PurePosixPath(first.name).parts[:1] == (FOLDER,):
                _check_md5(source, warn)
                return _of_batches(lambda name: _extract(tar, name, source), source)
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cifar10: {source} is no whole tar archive ({reason}); {_EXPECTED}") from error
    return _of_tar(source), None


def _of_tar(source):
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                check_member(member, source, "cifar10")
                place = _place(member.name)
                if member.isreg() and place:
                    yield *place, tar.extractfile(member).read()
    except _DAMAGED as error:
        raise UserError(f"cifar10: {source} ends too early ({error}); fetch it again") from error


def _place(name):
    """Part and CLASS/IMAGE of a path that ends in {train,test,val}/CLASS/IMAGE.jpg; None for others."""
    path = PurePosixPath(name)
    if len(path.parts) < 3 or path.suffix.lower() not in EXTENSIONS or path.parts[-3] not in _PARTS:
        return None
    return _PARTS[path.parts[-3]], "/".join(path.parts[-2:])


def _of_batches(read, source):
    try:
        classes = [name.decode() for name in load_batch(read(_META), f"{source}/{_META}")["label_names"]]
        batches = {part: [_checked(read(name), f"{source}/{name}", classes) for name in _BATCHES[part]]
                   for part in _BATCHES}  # fmt: skip
    except OSError as error:
        raise UserError(f"cifar10: {source} is not whole ({error}); fetch {ARCHIVE} again") from error
    total = sum(len(labels) for parts in batches.values() for _, labels in parts)
    return _drawn(batches, classes), total


def _drawn(batches, classes):
    for part, pairs in batches.items():
        images = np.concatenate([images for images, _ in pairs])
        labels = [label for _, labels in pairs for label in labels]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            yield part, f"{classes[label]}/{number:05d}.png", buffer.getvalue()


def _checked(data, name, classes):
    """Images uint8 [n, 32, 32, 3] and their labels."""
    batch = load_batch(data, name)
    images, labels = batch.get("data"), batch.get("labels")
    good = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 2 and images.shape[1] == 3072
    if not good or not isinstance(labels, list) or len(labels) != len(images):
        raise UserError(f"cifar10: {name} is no batch of CIFAR-10 (data uint8 [n, 3072] and n labels)")
    if not all(isinstance(label, int) and 0 <= label < len(classes) for label in labels):
        raise UserError(f"cifar10: {name} has labels outside 0 to {len(classes) - 1}")
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def _extract(tar, name, source):
    try:
        member = tar.getmember(f"{FOLDER}/{name}")
    except KeyError:
        raise UserError(f"cifar10: {source} holds no {FOLDER}/{name}; fetch {ARCHIVE} again") from None
    check_member(member, source, "cifar10")
    return tar.extractfile(member).read()


def _check_md5(path, warn):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != _MD5:
        warn(f"{path} is not the archive that its authors publish (md5 {found}, theirs {_MD5})")
