"""What a listing passes over, counted by reason: in words, and how much of it was meant to be an image.

A reason reads after a number (`12 dead links`). An extension alone (`.txt`) is of a file that is plainly not an image;
in `.heic (pip install pillow-heif)` the brackets say what to do about it.
"""

from collections.abc import Mapping

SYSTEM = "entries that systems leave behind (@eaDir, ._*, Thumbs.db, ...)"
# Neither is an image lost by them.
HARMLESS = frozenset({SYSTEM})

# Reasons that a sentence names.
_SHOWN = 5


def in_words(left_out: Mapping[str, int], shown: int = _SHOWN) -> str:
    """`12 dead links, 3 .heic (pip install pillow-heif) and 7 others`: what may be missed first; "" for nothing."""
    order = sorted(left_out.items(), key=lambda item: (not is_missed(item[0]), -item[1], item[0]))
    text = ", ".join(f"{count:,} {reason}" for reason, count in order[:shown])
    others = sum(count for _, count in order[shown:])
    return text + (f" and {others:,} others" if others else "")


def is_missed(reason: str) -> bool:
    """Whether what was left out for `reason` was meant to be an image, or may hold some."""
    return reason not in HARMLESS and (not reason.startswith(".") or "(" in reason)
