"""The images of a folder of tar shards in WebDataset's layout: members of one key belong together, KEY.jpg and KEY.cls.

The key is the member's name up to the first dot of its last part (webdataset's `base_plus_ext`).
"""

import tarfile
from pathlib import Path

import numpy as np

from fastsiam.config import UserError
from fastsiam.data import formats
from fastsiam.data.files import Files, Packed, is_outside, make_files, no_images


def shards_of_folder(root: Path) -> list[Path]:
    """The tar files in `root` itself, sorted by name."""
    return sorted(path for path in root.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))


def files_of_shards(root: Path, shards: list[Path], key: str) -> Files:
    """In the order of the shards' names and of the members in them; `key` is the config key that errors name."""
    found, labels, numbers, offsets = [], [], [], []
    for number, shard in enumerate(shards):
        for name, size, offset, label in _read_shard(shard, key):
            found.append((name, size))
            labels.append(label)
            numbers.append(number)
            offsets.append(offset)
    if not found:
        raise no_images(root, key, {})
    if -1 in labels and max(labels) >= 0:
        index = labels.index(-1)
        raise UserError(
            f"{key}: {shards[numbers[index]]} has no .cls member for {found[index][0]}, but others have one; "
            "give all images a label or none"
        )
    classes = tuple(str(label) for label in range(max(labels) + 1))
    packed = Packed(tuple(shard.name for shard in shards), np.array(numbers, np.int32), np.array(offsets, np.int64))
    return make_files(root, found, labels, classes, packed=packed)


def split_key(name: str) -> tuple[str, str]:
    """Key and extension: `a.b/c.d.jpg` is ("a.b/c", "d.jpg")."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension


def check_member(member: tarfile.TarInfo, shard: Path, key: str) -> None:
    """Raise `UserError` for what is no plain file inside the archive: links, devices, paths that lead out of it."""
    if is_outside(member.name) or ".." in member.name.split("/"):
        reason = "a path that leads out of the archive"
    elif member.issparse() or not (member.isreg() or member.isdir()):
        reason = "neither a plain file nor a folder"
    else:
        return
    raise UserError(f"{key}: {shard} holds {member.name}, {reason}; pack the files themselves under relative names")


def _read_shard(shard, key):
    """(name, size, offset, label) of each image."""
    images, labels = [], {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                check_member(member, shard, key)
                stem, extension = split_key(member.name)
                if not member.isreg():
                    continue
                if extension == "cls":
                    labels[stem] = _label(tar.extractfile(member).read(), member, shard, key)
                elif formats.by_extension().get(f".{extension.lower()}") is formats.IMAGE:
                    images.append((stem, member))
            # tarfile takes a header that is cut off for the end of the archive.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{key}: {shard} is not a whole uncompressed tar file ({error}); copy or unpack it again"
        ) from error
    known = set()
    for stem, member in images:
        if stem in known:
            raise UserError(f"{key}: {shard} holds two images of the key {stem}, for example {member.name}")
        known.add(stem)
    return [(member.name, member.size, member.offset_data, labels.get(stem, -1)) for stem, member in images]


def _label(text, member, shard, key):
    if not text.strip().isdigit():
        raise UserError(f"{key}: {shard} holds {member.name} with {text[:20]!r}; a label is a whole number from 0 on")
    return int(text)
