"""Equally many images of each class as a text list, in a fixed order: the first by name."""

from pathlib import Path

from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError


def write_list(folder: Path, count: int | None, out: Path, option: str) -> Path:
    """A list of `count` images of a labelled folder (None: of all), written to `out`/<name of the folder>.txt.

    A list reaches what lies below its own folder, so that the images appear there through a link. Raises `UserError`
    naming `option` where the classes cannot give equally many.
    """
    source = open_source(str(folder), option)
    if not source.classes:
        raise UserError(f"{option}: {folder} has no labels, which kNN needs: a folder of images for each class")
    if source.packed:
        raise UserError(f"{option}: {folder} holds tar shards, and the others read image files; give a folder of them")
    each = None if count is None else count // len(source.classes)
    if count is not None and (count < 1 or count % len(source.classes)):
        raise UserError(f"{option}: {count} images are not equally many of {len(source.classes)} classes")
    lines = []
    for label, name in enumerate(source.classes):
        members = [index for index in range(len(source)) if source.labels[index] == label]
        if each is not None and len(members) < each:
            raise UserError(f"{option}: {each} images of each class asked for, and {name} has {len(members)}")
        lines += [f"{folder.name}/{source.path(i).relative_to(source.root)}\t{name}" for i in members[:each]]
    out.mkdir(parents=True, exist_ok=True)
    link = out / folder.name
    if link.is_symlink() and link.resolve() != folder.resolve():
        raise UserError(f"{option}: {link} leads to {link.resolve()}, another race's images; name another --out")
    if not link.is_symlink():
        link.symlink_to(folder.resolve())
    path = out / f"{folder.name}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
