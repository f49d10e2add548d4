"""A folder without images, in words, and names that lead out of a folder."""

import os
from collections.abc import Mapping
from pathlib import Path

from fastsiam.data.sources.excluded import in_words
from fastsiam.data.sources.tables import shown
from fastsiam.errors import UserError

# Archives, whose images a run does not find.
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz", ".tgz", ".txz", ".xz", ".zip", ".zst")


def no_images(root: Path, key: str, excluded: Mapping[str, int]) -> UserError:
    """Returns the error of a folder without an image; `excluded`: numbers of the files in it, by reason."""
    text = f"{key}: no images under {shown(root)}: {_what_is_there(root)}"
    if excluded:
        text += f"; excluded: {in_words(excluded, 3)}"
    return UserError(f"{text}; {_advice(root, key)}", "no-images")


def is_outside(name: str) -> bool:
    """True for a relative name that leads out of its folder, judged without the file system."""
    return name.startswith("/") or os.path.normpath(name).split("/")[0] == ".."


def _what_is_there(root):
    names = sorted(os.listdir(root))
    if not names:
        return "the folder is empty"
    some = ", ".join(shown(name, 20) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"it holds {len(names)} {'entry' if len(names) == 1 else 'entries'} ({some})"


def _advice(root, key):
    packed = [name for name in sorted(os.listdir(root)) if name.lower().endswith(ARCHIVES)]
    if packed:
        return f"unpack {shown(packed[0], 40)} first"
    return f"set {key}=PATH to the folder that holds your images" if "." in key else "name a folder that holds images"
