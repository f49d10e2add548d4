"""Reasons why files of a folder are excluded: in words, and the share of them that was meant to be an image.

A reason reads after a number (`12 dead links`). An extension alone (`.txt`) is of a file that is plainly not an image;
in `.heic (pip install pillow-heif)` the brackets hold the remedy.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from fastsiam.data.sources.formats import NAMELESS
from fastsiam.data.sources.tables import shown
from fastsiam.errors import UserError

SYSTEM = "that systems leave behind (@eaDir, ._*, Thumbs.db, ...)"
HIDDEN_FILES, HIDDEN_FOLDERS = "hidden files", "hidden folders"
UNFINISHED, COPIES = "unfinished downloads", "backup copies"
SEEN, LOOPS = "links to a folder already seen", "links onto themselves"
DEAD_LINKS, GONE, EMPTY = "dead links", "that have gone meanwhile", "empty files"
DEVICES = "pipes, sockets or devices"
# In and beside tar shards.
FIELDS, REPLACED = "fields of another image (a.seg.png beside a.png)", "members replaced by a later one of their name"
GZIPPED, NOT_PLAIN = "gzipped images (gunzip them)", "links or sparse files in shards (pack the files)"
BESIDE = "images beside the shards"
COMPRESSED = "compressed shards (python -m fastsiam.prepare pack reads them where there are no others)"
FILES, FOLDERS = "files", "folders"

# Reasons by which no image is lost.
HARMLESS = frozenset(
    (SYSTEM, HIDDEN_FILES, HIDDEN_FOLDERS, UNFINISHED, COPIES, SEEN, LOOPS, GONE, DEVICES, NAMELESS, FIELDS, REPLACED)
) | {BESIDE, COMPRESSED}

# Reasons that a sentence names.
_SHOWN = 5


def in_words(counts: Mapping[str, int], most: int = _SHOWN) -> str:
    """`12 dead links, 3 .heic (pip install pillow-heif) and 7 others`: possible images first; "" for none."""
    order = sorted(counts.items(), key=lambda item: (not is_missed(item[0]), -item[1], item[0]))
    text = ", ".join(f"{count:,} {_singular(reason) if count == 1 else reason}" for reason, count in order[:most])
    others = sum(count for _, count in order[most:])
    return text + (f" and {others:,} others" if others else "")


def _singular(reason):
    for many, one in (("onto themselves", "onto itself"), ("that have", "that has"), ("files", "file")):
        reason = reason.replace(many, one)
    return re.sub(
        r"^(dead |hidden |gzipped |compressed )?(link|folder|name|image|field|member|shard)s\b", r"\1\2", reason
    )


def is_missed(reason: str) -> bool:
    """True where files excluded for `reason` were meant to be images, or may hold some."""
    return reason not in HARMLESS and (not reason.startswith(".") or "(" in reason)


def check(counts: Mapping[str, int], num_images: int, root: Path, key: str, most: float) -> None:
    """Raises `UserError` where more than a share `most` of the files meant to be images below `root` is excluded.

    `num_images`: number of usable images. `key`: the config key of `root`.
    """
    missed = {reason: count for reason, count in counts.items() if is_missed(reason)}
    total = sum(missed.values()) + num_images
    share = sum(missed.values()) / total
    if share <= most:
        return
    # The least share in one digit that lets the run begin.
    step = 10.0 ** math.floor(math.log10(share))
    enough = math.ceil(round(share / step, 9)) * step
    raise UserError(
        f"{key}: of {total:,} images under {shown(root)} {in_words(missed, 3)} cannot be used, more than "
        f"data.max_bad_fraction={most:g} allows; repair or remove them, or set data.max_bad_fraction={enough:g}",
        "too-many-excluded",
    )
