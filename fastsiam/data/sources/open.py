"""Opener of image sources: a folder of files or tar shards, a text list, a .beton, and the sources of a config."""

import os
import stat
from dataclasses import replace
from pathlib import Path

from fastsiam.config import Config
from fastsiam.data import demo_images
from fastsiam.data.sources import beton, excluded, formats, scan_manifest
from fastsiam.data.sources.folder import ARCHIVES
from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.index_cache import cache_folder, open_folder
from fastsiam.data.sources.labels import are_splits
from fastsiam.data.sources.levels import Levels
from fastsiam.data.sources.lists import source_of_list
from fastsiam.data.sources.pixel_range import levels_of
from fastsiam.data.sources.source import ImageSource
from fastsiam.data.sources.tables import is_numbered, shown
from fastsiam.data.sources.tar import COMPRESSED, is_hidden, no_plain_shards, source_of_shards
from fastsiam.errors import Notice, UserError

# Advice on labels for shards, and for files.
_LABELS_OF = (
    "KEY.cls or KEY.json beside KEY.jpg would give them",
    "a folder a class, or a list with labels after a tab, would give them",
)


def open_source(
    location: str,
    key: str = "data.train",
    scanned: str | None = None,
    max_bad_fraction: float = 1.0,
    levels: str | Levels = "scale",
) -> ImageSource:
    """Returns the images at `location`: a folder of files or of tar shards, a text list, or a .beton.

    `key` begins the messages of errors. `scanned`: manifest of a scan, by default the one in the index cache; images
    that it excludes are UNREADABLE or UNWANTED. `levels`: a value of `data.deep_pixels`, or the levels of other images.
    Raises `UserError` where there is no image, and where more than `max_bad_fraction` of the files that are meant to be
    images cannot be used: dead links, empty files, files that no installed decoder reads.
    """
    source = open_unscanned(location, key)
    path = Path(scanned) if scanned is not None else scan_manifest.default_path(cache_folder(Path(location)))
    by_scan = ""
    if scanned is not None or path.exists():
        by_scan = scan_manifest.apply(path, source, "data.manifest" if scanned is not None else key)
    empty = int(((source.file_sizes == 0) & (source.kinds < UNREADABLE)).sum())
    passed_over = {**source.excluded, excluded.EMPTY: empty} if empty else source.excluded
    excluded.check(passed_over, len(source) - empty, source.root, key, max_bad_fraction)
    if isinstance(levels, str):
        levels = levels_of(source, levels, path)
    return replace(source, excluded=passed_over, excluded_by_scan=by_scan, levels=levels)


def open_unscanned(location: str, key: str) -> ImageSource:
    """Returns all images at `location`, without the verdicts of a scan."""
    path = Path(location)
    if beton.is_beton(path):
        return beton.open_beton(path, key)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return open_folder(path, key)
        if stat.S_ISREG(mode) and path.suffix.lower() == ".tar":
            return source_of_shards(path.parent, [path.name], key)
        if stat.S_ISREG(mode):
            _check_is_a_list(path, key)
            return source_of_list(path, key)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(
            f"{key}: {shown(path)} cannot be read ({error.strerror}); give a place that you may read", "unreadable"
        ) from None
    advice = f"set {key}=PATH to" if "." in key else "give the path of"
    raise UserError(
        f"{key}: there is no {location}; {advice} your images: any folder of them, nested or flat (CLASS/IMAGE.jpg has "
        "labels), a folder of tar shards, or a text file with a path a line",
        "absent",
    )


def is_there(location: str) -> bool:
    """True where something exists, even where it may not be read."""
    try:
        os.stat(location)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def _check_is_a_list(path, key):
    """Raises `UserError` for a single image and for an archive."""
    with open(path, "rb") as file:
        is_image = formats.by_beginning(file.read(formats.BEGINNING), "") or formats.is_image(path.name)
    option = f"{key}=" if "." in key else ""
    if is_image:
        raise UserError(f"{key}: {shown(path)} is one image; give its folder: {option}{shown(path.parent)}", "is-image")
    if path.name.lower().endswith(COMPRESSED):
        raise no_plain_shards(path.parent, [path.name], key)
    if path.name.lower().endswith(ARCHIVES):
        what = "the folder that holds it" if path.suffix == ".tar" else "what it holds, unpacked"
        raise UserError(f"{key}: {shown(path)} is an archive; give {what}: {option}FOLDER", "is-archive")


def open_sources(config: Config, warn, say) -> tuple[ImageSource | None, ImageSource | None]:
    """Returns the training images of a config and its labelled ones for kNN; draws missing demo images.

    None for the first with the synthetic backend, for the second where there is no kNN. `warn` gets a `Notice` for a
    `data.val` that does not exist, or holds demo images while data.train does not. Raises `UserError` for labels that
    kNN or evaluate.online_linear cannot use.
    """
    data = config.data
    if data.backend == "synthetic":
        return None, None
    draw_missing_demo(config, say)
    splits = splits_in(data.train)
    if splits:
        text = f"data.train: {data.train} holds {', '.join(splits)}, and all of their images are used"
        warn(Notice(f"{text}; set data.train={data.train}/{splits[0]} to train on one of them", "trains-on-splits"))
    train = open_source(
        data.train, scanned=data.manifest, max_bad_fraction=data.max_bad_fraction, levels=data.deep_pixels
    )
    if config.evaluate.online_linear and not train.classes:
        raise UserError(
            f"evaluate.online_linear: a linear classifier needs labels, and {shown(train.root)} has none "
            f"({_why_unlabelled(train, 'data.train')}); set evaluate.online_linear=false",
            "no-labels",
        )
    return train, open_validation(config, train, warn)


def _why_unlabelled(source, key):
    return source.labelling or _table_in(source.root, key) or _LABELS_OF[source.packed is None]


def splits_in(location: str) -> list[str]:
    """Returns the subfolders of a folder that has several, all of which divide a data set (train, val); else []."""
    if not os.path.isdir(location):
        return []
    with os.scandir(location) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    # The training images first, as a default to name.
    names.sort(key=lambda name: not name.lower().startswith("train"))
    return names if len(names) > 1 and are_splits(names) else []


def open_validation(config: Config, train: ImageSource, warn) -> ImageSource | None:
    """Returns the images of data.val for kNN with `train`; see `open_sources`."""
    data = config.data
    if data.val is None:
        return None
    advice = "set data.val to labelled images of your classes, or data.val=null"
    if not is_there(data.val):
        warn(Notice(f"data.val: there is no {data.val}, so no kNN; {advice}", "no-validation"))
        return None
    levels = train.levels if train.levels.ranges else data.deep_pixels
    val = open_source(data.val, "data.val", max_bad_fraction=data.max_bad_fraction, levels=levels)
    try:
        check_labels(train, val)
    except UserError:
        # Whoever sets data.train alone leaves the config's data.val, which is not a mistake.
        if not (Path(data.val).parent / demo_images.NOTE).is_file():
            raise
        sentence = f"data.val: {data.val} holds demo images and {data.train} does not, so no kNN; {advice}"
        warn(Notice(sentence, "demo-validation"))
        return None
    return val


def demo_folder(config: Config) -> Path | None:
    """Returns FOLDER of data.train=FOLDER/train where demo images belong, drawn or not; None otherwise."""
    data = config.data
    if data.backend == "synthetic" or data.demo_seed is None or Path(data.train).name != "train":
        return None
    folder = Path(data.train).parent
    return folder if (folder / demo_images.NOTE).is_file() or not folder.exists() else None


def draw_missing_demo(config: Config, say) -> None:
    """Draws the demo images of `data.demo_seed` where they are missing; raises `UserError` where others exist."""
    folder = demo_folder(config)
    if folder is None:
        return
    if not folder.exists():
        say(f"drawing   the demo images of seed {config.data.demo_seed} into {folder}")
    try:
        demo_images.draw_demo(folder, config.data.demo_seed)
    except (UserError, OSError) as error:
        sentence = f"data.demo_seed: {error}; set data.train to a folder of images to use yours"
        raise UserError(sentence, "demo-images") from error


def _table_in(root: Path, key: str) -> str:
    """Returns advice to read a table in a folder without labels; "" where there is none."""
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    name = next((name for name in names if name.lower().endswith((".csv", ".tsv", ".jsonl", ".txt"))), None)
    return f"{key}={shown(root / name)} reads it as a list" if name else ""


def check_labels(
    train: ImageSource, val: ImageSource, keys: tuple[str, str] = ("data.train", "data.val"), what: str = "kNN"
) -> None:
    """Raises `UserError` where `what` is impossible: no labels, or classes of `val` that `train` does not have.

    `keys`: config keys or options of the two, with which messages begin.
    """
    of_run = keys[1] == "data.val"
    for key, source in zip(keys, (train, val), strict=True):
        if not source.classes:
            reason = _why_unlabelled(source, key)
            advice = "set data.val=null to train without kNN" if of_run else f"give {key} labelled images"
            raise UserError(
                f"{key}: {what} needs labels, and {shown(source.root)} has none ({reason}); {advice}", "no-labels"
            )
    unknown = sorted(set(val.classes) - set(train.classes))
    advice = ", or set data.val=null" if of_run else ""
    if unknown and is_numbered(val.classes) and not is_numbered(train.classes):
        raise UserError(
            f"{keys[1]}: its labels are numbers ({shown(unknown[0], 20)}, ...), those of {keys[0]} are words "
            f"({shown(train.classes[0], 20)}, ...); label both alike{advice}",
            "labels-differ",
        )
    if unknown:
        advice = ", or data.val=null" if of_run else ""
        raise UserError(
            f"{keys[1]}: {len(unknown)} of its {len(val.classes)} classes are not in {keys[0]}, for example "
            f"{shown(unknown[0], 40)}; set {keys[1]} to images of the same classes{advice}",
            "unknown-classes",
        )
