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

from fastsiam.data.sources.formats import is_image
from fastsiam.data.sources.tar import check_member
from fastsiam.data.sources.walk import is_system
from fastsiam.errors import UserError

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
_MD5 = "c58f30108f718f92721af3b95e74349a"
_META = "batches.meta"
_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "val": ("test_batch",)}
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
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                raise UserError(
                    f"cifar10: {source} has two images for {part}/{name} (test and val both become val); "
                    "rename or leave out one"
                ) from None
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
    """A pickled dict of plain values and uint8 arrays, by string keys; raises `UserError` for what asks for more."""
    try:
        batch = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except _UNPICKLED as error:
        raise UserError(f"cifar10: {name} is no batch of CIFAR-10 ({error})") from error
    if not isinstance(batch, dict):
        raise UserError(f"cifar10: {name} is no batch of CIFAR-10 (it holds no dict)")
    batch = {key.decode(errors="replace") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    return {key: value.values if isinstance(value, _Array) else value for key, value in batch.items()}


class _Bytes:
    """Stands for the dtype uint8 in a pickle; there is no other."""

    __slots__ = ()

    def __init__(self, name, *flags):
        if name not in ("u1", b"u1", "|u1", b"|u1", "uint8", b"uint8"):
            raise pickle.UnpicklingError(f"it asks for the dtype {name!r}")

    def __setstate__(self, state):
        # Version, byte order, subarray, names, fields, and sizes that are those of the name.
        if state[1] not in ("|", b"|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it asks for a dtype of several parts")


class _Array:
    """Stands for an array in a pickle; numpy itself would also make arrays of objects."""

    values = None

    def __init__(self, *kind):
        pass

    def __setstate__(self, state):
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Bytes) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("it asks for an array that is not uint8")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


# What a pickle of arrays asks for; numpy has moved its module since the archive was written.
_ALLOWED = {
    # Only ever an argument.
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Bytes,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    # How Python 3 writes bytes in protocol 2.
    ("_codecs", "encode"): codecs.encode,
}
# What unpickling raises for bytes that are no pickle, or a forged one.
_UNPICKLED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError
)  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    """Makes arrays of uint8, numbers, strings, lists and dicts; calls nothing else that a file names."""

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
                    if not all(_is_plain(part) for part in place[1].split("/")):
                        raise UserError(f"cifar10: {source} holds {member.name!r}, which cannot name a file")
                    yield *place, tar.extractfile(member).read()
    except _DAMAGED as error:
        raise UserError(f"cifar10: {source} ends too early ({error}); fetch it again") from error


def _place(name):
    """Part and CLASS/IMAGE of a path that ends in {train,test,val}/CLASS/IMAGE.jpg; None for others."""
    path = PurePosixPath(name)
    if (
        len(path.parts) < 3
        or path.parts[-3] not in _PARTS
        or not is_image(path.name)
        or any(map(is_system, path.parts))
    ):
        return None
    return _PARTS[path.parts[-3]], "/".join(path.parts[-2:])


def _is_plain(name):
    """Whether it names a file or folder of its own in any folder."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _classes(data, name):
    names = load_batch(data, name).get("label_names")
    if not isinstance(names, list) or not all(isinstance(label, (str, bytes)) for label in names):
        raise UserError(f"cifar10: {name} is no {_META} of CIFAR-10 (a list label_names of strings)")
    names = [label.decode(errors="replace") if isinstance(label, bytes) else label for label in names]
    bad = next((label for label in names if not _is_plain(label)), None)
    if bad is not None:
        raise UserError(f"cifar10: {name} names the class {bad!r}, which cannot name a folder")
    if len(set(names)) < len(names):
        raise UserError(f"cifar10: {name} names a class twice")
    return names


def _of_batches(read, source):
    try:
        classes = _classes(read(_META), f"{source}/{_META}")
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
    if not all(type(label) is int and 0 <= label < len(classes) for label in labels):
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
