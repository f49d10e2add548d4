"""What images there are, and where the bytes of each lie: a folder, a text list, or tar shards."""

import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastsiam.config import Config
from fastsiam.data import demo_images
from fastsiam.data.sources import beton, excluded, formats, scan_manifest
from fastsiam.data.sources.folder import ARCHIVES, Files, Packed, fingerprint
from fastsiam.data.sources.image_header import ODD, UNKNOWN, UNREADABLE, BadImageError, read_header
from fastsiam.data.sources.index_cache import Index, cache_folder, open_folder, unread
from fastsiam.data.sources.lists import files_of_list
from fastsiam.data.sources.pixel_range import Levels, levels_of
from fastsiam.data.sources.tables import is_numbered, shown
from fastsiam.data.sources.tar import COMPRESSED, files_of_shards, no_plain_shards
from fastsiam.errors import UserError

_READERS = 8
# What would give labels to shards, and to files.
_LABELS_OF = (
    "KEY.cls or KEY.json beside KEY.jpg would give them",
    "a folder a class, or a list with labels after a tab, would give them",
)


@dataclass(frozen=True)
class ImageSource:
    """N images below one root, in an order of their own that runs depend on.

    Names are one bytes array, not N Python objects: a list would be copied page by page into every worker.
    """

    root: Path
    names: np.ndarray
    """[N] bytes ('S'): paths relative to `root`, or names of members."""
    file_sizes: np.ndarray
    """[N] int64, bytes."""
    labels: np.ndarray
    """[N] int64; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by label; empty where there are no labels."""
    image_sizes: np.ndarray
    """[N, 2] int32 heights and widths as displayed (EXIF orientation applied), 0 until read by `look`."""
    kinds: np.ndarray
    """[N] uint8, of `fastsiam.data.sources.image_header`: UNKNOWN until read by `look`."""
    packed: Packed | None = None
    """None where each image is a file of its own."""
    cached_kinds: np.ndarray | None = None
    """`kinds` in the index cache, where `look` writes too; a file that cannot be read is looked at again next time."""
    known_fingerprint: str | None = None
    """From the index; None: `fingerprint` computes it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many files and folders below the root are passed over, by reason; of the N only empty files, which a run
    finds bad."""
    labelling: str = ""
    """How the labels were read, or why there are none where some could be expected."""
    left_out_by_scan: str = ""
    """How many of the N a scan leaves out, why, and by which manifest; empty for none."""
    levels: Levels = Levels()  # noqa: RUF009
    """How pixels of more than eight bits become eight."""
    converted: set[int] = field(default_factory=set)
    """Images that this process has found to be decoded by PIL only."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where the image's file is, or the shard that holds it."""
        if self.packed:
            return self.root / self.packed.shards[self.packed.shard[index]]
        return self.root / os.fsdecode(bytes(self.names[index]))

    def name(self, index: int) -> str:
        """For people: path of the file, or of the shard and the member in it."""
        return f"{self.path(index)}/{os.fsdecode(bytes(self.names[index]))}" if self.packed else str(self.path(index))

    def read(self, index: int) -> bytes:
        """The image's encoded bytes; raises `BadImageError` where they cannot be read."""
        try:
            with open(self.path(index), "rb") as file:
                if not self.packed:
                    return file.read()
                data = os.pread(file.fileno(), self.file_sizes[index], self.packed.offset[index])
        except OSError as error:
            raise BadImageError(f"{self.name(index)} cannot be read: {error}") from error
        if len(data) != self.file_sizes[index]:
            raise BadImageError(f"{self.name(index)} cannot be read: the shard ends after {len(data)} bytes of it")
        return data

    def look(self, indices: np.ndarray) -> dict[int, str]:
        """Read the headers of those images that nobody has looked at; returns why some cannot be read, by index."""
        missing = np.unique(indices[self.kinds[indices] == UNKNOWN])
        reasons = {}
        if len(missing):
            with ThreadPoolExecutor(min(_READERS, len(missing))) as pool:
                found = list(pool.map(self._header, missing.tolist()))
            for index, header in zip(missing.tolist(), found, strict=True):
                if isinstance(header, str):
                    reasons[index] = header
                    self.kinds[index] = UNREADABLE
                else:
                    self.image_sizes[index], self.kinds[index] = header[:2], header.kind
                    if self.cached_kinds is not None:
                        self.cached_kinds[index] = header.kind
        return reasons

    def forget(self, indices: Iterable[int]) -> None:
        """Do not trust the cache for these images, which were not as their headers said: the next start looks again."""
        if self.cached_kinds is not None:
            self.cached_kinds[list(indices)] = UNKNOWN

    def convert(self, indices: Iterable[int]) -> None:
        """Leave these images to PIL from now on, whatever their headers say; the next start knows them."""
        chosen = list(indices)
        self.kinds[chosen] = ODD
        if self.cached_kinds is not None:
            self.cached_kinds[chosen] = ODD
        self.converted.update(chosen)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """Heights and widths [n, 2] int32 of some images, 0 where the header cannot be read."""
        self.look(indices)
        return self.image_sizes[indices]

    def label_text(self) -> str:
        """How many classes there are, some of them, and how they were read; "" where no labels could be expected."""
        if not self.classes:
            return f"none under {self.root}: {self.labelling}" if self.labelling else ""
        some = ", ".join(shown(name, 20) for name in self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        what = "class" if len(self.classes) == 1 else "classes"
        text = f"{len(self.classes):,} {what} ({some}) {self.labelling}".rstrip()
        unlabelled = np.flatnonzero(self.labels < 0)
        if len(unlabelled):
            has = "1 image has" if len(unlabelled) == 1 else f"{len(unlabelled):,} images have"
            text += f"; {has} none and cannot serve kNN, for example {shown(os.fsdecode(self.names[unlabelled[0]]))}"
        return text

    def left_out_texts(self) -> list[str]:
        """What is passed over, and what a scan leaves out, in a sentence each; empty for nothing."""
        passed_over = f"{excluded.in_words(self.left_out)} under {self.root}" if self.left_out else ""
        return [text for text in (passed_over, self.left_out_by_scan) if text]

    def fingerprint(self) -> str:
        """Hash of relative names and file sizes: the same data under another root has the same one."""
        return self.known_fingerprint or fingerprint(self.names, self.file_sizes)

    def _header(self, index):
        try:
            return read_header(self.read(index) if self.packed else self.path(index), self.name(index))
        except BadImageError as error:
            return str(error)


def open_source(
    location: str,
    key: str = "data.train",
    scanned: str | None = None,
    max_bad_fraction: float = 1.0,
    levels: str | Levels = "scale",
) -> ImageSource:
    """The images at `location`: a folder of files or of tar shards, a text list, or a .beton; `key` is for errors.

    `scanned`: the manifest of a scan; without one, that in the index cache, if there is one. Images that it leaves out
    are UNREADABLE or UNWANTED. `levels`: of `data.deep_pixels`, or those of other images. Raises `UserError` where more
    than `max_bad_fraction` of what was meant to be an image cannot be one here (dead links, empty files, files that no
    installed decoder reads), and where there is no image.
    """
    source = open_unscanned(location, key)
    path = Path(scanned) if scanned is not None else scan_manifest.default_path(cache_folder(Path(location)))
    by_scan = ""
    if scanned is not None or path.exists():
        by_scan = scan_manifest.apply(path, source, "data.manifest" if scanned is not None else key)
    empty = int(((source.file_sizes == 0) & (source.kinds < UNREADABLE)).sum())
    passed_over = {**source.left_out, excluded.EMPTY: empty} if empty else source.left_out
    excluded.check(passed_over, len(source) - empty, source.root, key, max_bad_fraction)
    if isinstance(levels, str):
        levels = levels_of(source, levels, path)
    return replace(source, left_out=passed_over, left_out_by_scan=by_scan, levels=levels)


def open_unscanned(location: str, key: str) -> ImageSource:
    """All images at `location`, whatever a scan has found."""
    path = Path(location)
    if beton.is_beton(path):
        return beton.open_beton(path, key)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _of_index(open_folder(path, key))
        if stat.S_ISREG(mode) and path.suffix.lower() == ".tar":
            return of_files(files_of_shards(path.parent, [path.name], key))
        if stat.S_ISREG(mode):
            _check_is_a_list(path, key)
            return of_files(files_of_list(path, key))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(
            f"{key}: {shown(path)} cannot be read ({error.strerror}); give a place that you may read"
        ) from None
    advice = f"set {key}=PATH to" if "." in key else "give the path of"
    raise UserError(
        f"{key}: there is no {location}; expected {location}/CLASS/IMAGE.jpg (one folder a class, as ImageNet is "
        f"usually unpacked); {advice} your images: any folder of them, nested or flat, with labels or "
        "without, a folder of tar shards, or a text file with a path a line"
    )


def is_there(location: str) -> bool:
    """Whether there is something, be it closed to us."""
    try:
        os.stat(location)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def _check_is_a_list(path, key):
    """Raise `UserError` for one image, and for an archive."""
    with open(path, "rb") as file:
        is_image = formats.by_beginning(file.read(formats.BEGINNING), "") or formats.is_image(path.name)
    option = f"{key}=" if "." in key else ""
    if is_image:
        raise UserError(f"{key}: {shown(path)} is one image; give its folder: {option}{shown(path.parent)}")
    if path.name.lower().endswith(COMPRESSED):
        raise no_plain_shards(path.parent, [path.name], key)
    if path.name.lower().endswith(ARCHIVES):
        what = "the folder that holds it" if path.suffix == ".tar" else "what it holds, unpacked"
        raise UserError(f"{key}: {shown(path)} is an archive; give {what}: {option}FOLDER")


def of_files(files: Files) -> ImageSource:
    """A source of files that nobody has looked at yet."""
    return _of_index(unread(files))


def _of_index(index: Index) -> ImageSource:
    return ImageSource(
        **index.files._asdict(),
        image_sizes=index.image_sizes,
        kinds=index.kinds,
        cached_kinds=index.cached_kinds,
        known_fingerprint=index.fingerprint,
    )


def open_sources(config: Config, warn, say) -> "tuple[ImageSource | None, ImageSource | None]":
    """The training images of a config and its labelled ones for kNN; draws the demo images where asked and absent.

    None for the first with the synthetic backend, for the second where there is no kNN. A `data.val` that does not
    exist, or is of demo images while data.train has others, is told through `warn`; labels that cannot serve raise
    `UserError`.
    """
    data = config.data
    if data.backend == "synthetic":
        return None, None
    draw_missing_demo(config, say)
    train = open_source(
        data.train, scanned=data.manifest, max_bad_fraction=data.max_bad_fraction, levels=data.deep_pixels
    )
    return train, open_validation(config, train, warn)


def open_validation(config: Config, train: ImageSource, warn) -> ImageSource | None:
    """The images of data.val where they can serve `train`; see `open_sources`."""
    data = config.data
    if data.val is None:
        return None
    advice = "set data.val to labelled images of your classes, or data.val=null"
    if not is_there(data.val):
        warn(f"no kNN: there is no {data.val}; {advice}")
        return None
    levels = train.levels if train.levels.ranges else data.deep_pixels
    val = open_source(data.val, "data.val", max_bad_fraction=data.max_bad_fraction, levels=levels)
    try:
        check_labels(train, val)
    except UserError:
        # The config's own val beside somebody's images, not a mistake of theirs.
        if not (Path(data.val).parent / demo_images.NOTE).is_file():
            raise
        warn(f"no kNN: {data.val} holds demo images and {data.train} does not; {advice}")
        return None
    return val


def demo_folder(config: Config) -> Path | None:
    """FOLDER of data.train=FOLDER/train where demo images are asked for and nothing else lies there; need not exist."""
    data = config.data
    if data.backend == "synthetic" or data.demo_seed is None or Path(data.train).name != "train":
        return None
    folder = Path(data.train).parent
    return folder if (folder / demo_images.NOTE).is_file() or not folder.exists() else None


def draw_missing_demo(config: Config, say) -> None:
    """Draw the demo images of `data.demo_seed` where they are missing; raises `UserError` where they are others."""
    folder = demo_folder(config)
    if folder is None:
        return
    if not folder.exists():
        say(f"drawing   the demo images of seed {config.data.demo_seed} into {folder}")
    try:
        demo_images.draw_demo(folder, config.data.demo_seed)
    except (ValueError, OSError) as error:
        raise UserError(f"data.demo_seed: {error}; set data.train to a folder of images to use yours") from error


def _table_in(root: Path, key: str) -> str:
    """What to type where a folder without labels holds a table that may have them; "" for none."""
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    name = next((name for name in names if name.lower().endswith((".csv", ".tsv", ".jsonl", ".txt"))), None)
    return name and f"{key}={shown(root / name)} reads it as a list"


def check_labels(train: ImageSource, val: ImageSource) -> None:
    """Raise `UserError` where kNN is impossible: no labels, or classes of `val` that `train` does not have."""
    for key, source in (("data.train", train), ("data.val", val)):
        if not source.classes:
            reason = source.labelling or _table_in(source.root, key) or _LABELS_OF[source.packed is None]
            raise UserError(
                f"{key}: kNN needs labels, and {shown(source.root)} has none ({reason}); set data.val=null to train "
                "without kNN"
            )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown and is_numbered(val.classes) and not is_numbered(train.classes):
        raise UserError(
            f"data.val: its labels are numbers ({shown(unknown[0], 20)}, ...), those of data.train are words "
            f"({shown(train.classes[0], 20)}, ...); label both alike, or set data.val=null"
        )
    if unknown:
        raise UserError(
            f"data.val: {len(unknown)} of its {len(val.classes)} classes are not in data.train, for example "
            f"{shown(unknown[0], 40)}; set data.val to images of the same classes, or data.val=null"
        )
