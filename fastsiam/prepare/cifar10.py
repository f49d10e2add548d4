"""Converter of CIFAR-10 to folders of images, OUT/{train,val}/CLASS/..., from its authors' archive or from images."""

import io
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from fastsiam.data.sources.formats import is_image
from fastsiam.data.sources.tar import check_member
from fastsiam.data.sources.walk import is_system
from fastsiam.errors import UserError

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, LZMAError)
_PARTS = {"train": "train", "test": "val", "val": "val"}
_EXPECTED = f"give {ARCHIVE}, its folder {FOLDER}, or a folder or tar of images {{train,test}}/CLASS/IMAGE.jpg"

Images = Iterator[tuple[str, str, bytes]]
"""Part, CLASS/IMAGE and encoded bytes of every image."""


def convert(
    source: Path | None, out: Path, progress: Callable[[int, int | None], None] = lambda done, total: None
) -> dict[str, int]:
    """Writes OUT/{train,val}/CLASS/ and returns the number of images of each part.

    Arrays of the archive become PNG files named by their index, images keep their bytes and names; test becomes val.
    OUT is either absent or whole. `source`: None downloads the archive. `progress(done, total)` is called after every
    image; the total is None for a tar of images. Raises `UserError` for other input, and where OUT exists.
    """
    if out.exists():
        raise UserError(f"OUT: {out} exists; name a new folder, or delete this one", "exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "val": 0}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as partial:
        whole = Path(partial) / out.name
        images, total = _open(source, Path(partial))
        for part, name, data in images:
            path = whole / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                raise UserError(
                    f"SRC: {source} has two images for {part}/{name} (test and val both become val); rename one",
                    "same-name",
                ) from None
            counts[part] += 1
            progress(sum(counts.values()), total)
        if not all(counts.values()):
            missing = "train" if not counts["train"] else "test"
            raise UserError(f"SRC: {source} has no {missing} images; {_EXPECTED}", "no-images")
        classes = [sorted(path.name for path in (whole / part).iterdir()) for part in counts]
        if classes[0] != classes[1]:
            raise UserError(
                f"SRC: classes of train {classes[0]} and test {classes[1]} differ in {source}; name them alike",
                "classes-differ",
            )
        whole.rename(out)
    return counts


def _open(source: Path | None, scratch: Path) -> tuple[Images, int | None]:
    """Returns every image and their number, None where it is not known; `scratch`: a folder for unpacked files."""
    if source is None:
        return _of_batches(_download(scratch))
    if not source.exists():
        raise UserError(f"SRC: there is no {source}; {_EXPECTED}", "absent")
    if source.is_dir():
        for folder in (source, source / FOLDER):
            if (folder / "batches.meta").exists():
                return _of_batches(folder)
        paths = [(path, _place(path.relative_to(source).as_posix())) for path in sorted(source.rglob("*"))]
        paths = [(path, place) for path, place in paths if place and path.is_file()]
        return ((*place, path.read_bytes()) for path, place in paths), len(paths)
    try:
        with tarfile.open(source) as tar:
            first = tar.next()
            if first is not None and PurePosixPath(first.name).parts[:1] == (FOLDER,):
                tar.extractall(scratch, filter="data")
                return _of_batches(scratch / FOLDER)
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"SRC: {source} is not a whole tar archive ({reason}); {_EXPECTED}", "damaged") from error
    return _of_tar(source), None


def _download(folder: Path) -> Path:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"SRC: the archive cannot be downloaded ({error}); fetch {ARCHIVE} elsewhere and give its path",
            "no-download",
        ) from error
    return folder / FOLDER


def _of_batches(folder: Path) -> tuple[Images, int]:
    """Images of the archive's files. torchvision compares each with its published MD5 before it unpickles them."""
    from torchvision.datasets import CIFAR10

    class Batches(CIFAR10):
        base_folder = ""

    try:
        parts = {part: Batches(folder, train=part == "train") for part in ("train", "val")}
    except RuntimeError as error:
        raise UserError(
            f"SRC: the files in {folder} are damaged, or not those of CIFAR-10's authors; fetch {ARCHIVE} again",
            "damaged",
        ) from error
    return _as_png(parts), sum(map(len, parts.values()))


def _as_png(parts) -> Images:
    for part, dataset in parts.items():
        for number, (image, label) in enumerate(dataset):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            yield part, f"{dataset.classes[label]}/{number:05d}.png", buffer.getvalue()


def _of_tar(source: Path) -> Images:
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                check_member(member, source, "SRC")
                place = _place(member.name)
                if member.isreg() and place:
                    if "\0" in member.name:
                        raise UserError(f"SRC: {source} holds {member.name!r}; rename it", "bad-name")
                    yield *place, tar.extractfile(member).read()
    except _DAMAGED as error:
        raise UserError(f"SRC: {source} ends too early ({error}); fetch it again", "damaged") from error


def _place(name: str) -> tuple[str, str] | None:
    """Returns part and CLASS/IMAGE of a path that ends in {train,test,val}/CLASS/IMAGE.jpg; None for others."""
    path = PurePosixPath(name)
    if len(path.parts) < 3 or path.parts[-3] not in _PARTS:
        return None
    if not is_image(path.name) or any(map(is_system, path.parts)):
        return None
    return _PARTS[path.parts[-3]], "/".join(path.parts[-2:])
