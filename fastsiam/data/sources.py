"""What images there are: a folder (labelled, nested or flat) or a text list of files."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastsiam.config import Config, UserError
from fastsiam.data import demo

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)


class BadImageError(UserError):
    """A file that cannot be decoded, by name."""


@dataclass(frozen=True)
class ImageSource:
    """N image files below one root; the order is that of the sorted relative names.

    Names are one bytes array, not N Python objects: a list would be copied page by page into every worker.
    """

    root: Path
    names: np.ndarray
    """[N] bytes ('S'): paths relative to `root`."""
    file_sizes: np.ndarray
    """[N] int64, bytes."""
    labels: np.ndarray
    """[N] int64; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by label; empty where there are no labels."""
    image_sizes: np.ndarray
    """[N, 2] int32 heights and widths as displayed (EXIF orientation applied), 0 until read by `sizes`."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[index]))

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Heights and widths [n, 2] int32 of some images, read from the files' headers at their first use.

        Raises `BadImageError` naming a file whose header cannot be read.
        """
        missing = np.unique(indices[self.image_sizes[indices, 0] == 0])
        if len(missing):
            with ThreadPoolExecutor(min(8, len(missing))) as pool:
                self.image_sizes[missing] = list(pool.map(lambda i: displayed_size(self.path(i)), missing))
        return self.image_sizes[indices]

    def fingerprint(self) -> str:
        """Hash of relative names and file sizes: the same data under another root has the same one."""
        digest = hashlib.sha256(self.names.tobytes())
        digest.update(self.file_sizes.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def open_source(location: str, key: str = "data.train") -> ImageSource:
    """The images at `location`, a folder or a text list; `key` is the config key that errors name."""
    path = Path(location)
    if path.is_dir():
        return _from_folder(path, key)
    if path.is_file():
        return _from_list(path, key)
    raise UserError(
        f"{key}: there is no {location}; expected {location}/CLASS/IMAGE.jpg (one folder a class, as ImageNet is "
        f"usually unpacked); set {key}=PATH to your images: any folder of them, nested or flat, with labels or "
        "without, or a text file with a path a line"
    )


def open_sources(config: Config, warn, say) -> "tuple[ImageSource | None, ImageSource | None]":
    """The training images of a config and its labelled ones for kNN; draws the demo images where asked and absent.

    None for the first with the synthetic backend, for the second where there is no kNN. A `data.val` that does not
    exist is told through `warn`, labels that cannot serve raise `UserError`.
    """
    data = config.data
    if data.backend == "synthetic":
        return None, None
    if data.demo_seed is not None:
        draw_missing_demo(config, say)
    train = open_source(data.train)
    if data.val is None:
        return train, None
    if not Path(data.val).exists():
        warn(f"no kNN: there is no {data.val}; set data.val to labelled images, or data.val=null")
        return train, None
    val = open_source(data.val, "data.val")
    check_labels(train, val)
    return train, val


def draw_missing_demo(config: Config, say) -> None:
    """Draw the demo images of `data.demo_seed` into the folder that holds data.train and data.val."""
    train, val = Path(config.data.train), Path(config.data.val or config.data.train).with_name("val")
    if train.name != "train" or config.data.val is None or val != Path(config.data.val) or train.parent != val.parent:
        raise UserError(
            f"data.demo_seed: the demo images are drawn to FOLDER/train and FOLDER/val, but data.train is {train} and "
            f"data.val is {config.data.val}; set both, or data.demo_seed=null to use your own images"
        )
    if not train.parent.exists():
        say(f"drawing   the demo images of seed {config.data.demo_seed} into {train.parent}")
    try:
        demo.draw_demo(train.parent, config.data.demo_seed)
    except ValueError as error:
        raise UserError(f"data.demo_seed: {error}") from error


def check_labels(train: ImageSource, val: ImageSource) -> None:
    """Raise `UserError` where kNN is impossible: no labels, or classes of `val` that `train` does not have."""
    for key, source in (("data.train", train), ("data.val", val)):
        if not source.classes:
            raise UserError(
                f"{key}: kNN needs labels, and {source.root} has none (a folder a class, or a list with labels "
                "after a tab); set data.val=null to train without kNN"
            )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"data.val: {len(unknown)} of its {len(val.classes)} classes are not in data.train, for example "
            f"{unknown[0]}; set data.val to images of the same classes, or data.val=null"
        )


def displayed_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image as displayed, from its header; raises `BadImageError`."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Only an EXIF block can turn the image, and parsing one costs more than the rest of the header.
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise BadImageError(f"{path} cannot be decoded: {error}") from error
    return (width, height) if turned else (height, width)


def _from_folder(root: Path, key: str) -> ImageSource:
    found = sorted(_walk(root))
    if not found:
        raise UserError(f"{key}: no images under {root}: {_what_is_there(root)}; looked for {' '.join(EXTENSIONS)}")
    firsts = [name.partition("/")[0] if "/" in name else None for name, _ in found]
    classes = tuple(sorted(set(firsts))) if None not in firsts else ()
    if len(classes) < 2:
        classes = ()
    number = {name: label for label, name in enumerate(classes)}
    return _source(root, found, [number.get(first, -1) for first in firsts], classes)


def _from_list(path: Path, key: str) -> ImageSource:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is neither a folder nor a text file with a path a line") from None
    if not lines:
        raise UserError(f"{key}: the list {path} is empty")
    entries = [line.partition("\t") for line in lines]
    names = [name.strip() for name, _, _ in entries]
    given = [label.strip() for _, _, label in entries]
    if any(given) and not all(given):
        line = given.index("") + 1
        raise UserError(f"{key}: in {path} some lines have a label after a tab, but entry {line} has none")
    classes = tuple(sorted(set(given))) if all(given) else ()
    number = {name: label for label, name in enumerate(classes)}
    found = []
    for name in names:
        try:
            found.append((name, (path.parent / name).stat().st_size))
        except OSError:
            raise UserError(f"{key}: {path} lists {name}, but there is no {path.parent / name}") from None
    return _source(path.parent, found, [number.get(label, -1) for label in given], classes)


def _source(root, found, labels, classes):
    names, file_sizes = zip(*found, strict=True)
    return ImageSource(
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        file_sizes=np.array(file_sizes, np.int64),
        labels=np.array(labels, np.int64),
        classes=classes,
        image_sizes=np.zeros((len(names), 2), np.int32),
    )


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Relative names and sizes of the image files below `root`, following links but no loop; hidden ones not."""
    seen = set()
    stack = [""]
    while stack:
        folder = stack.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    stack.append(name)
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    yield name, entry.stat().st_size


def _what_is_there(root: Path) -> str:
    names = sorted(os.listdir(root))
    if not names:
        return "the folder is empty"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"it holds {len(names)} {'entry' if len(names) == 1 else 'entries'} ({shown})"
