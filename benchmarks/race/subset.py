"""Equally many images of each class as a text list, in a fixed order: the first by name."""

from pathlib import Path

from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError


def write_list(folder: Path, count: int | None, out: Path, option: str, classes: int | None = None) -> Path:
    """A list of `count` images of a labelled folder (None: of all), written to `out`/<name of the folder>.txt.

    `classes`: of the first so many classes; None: of all.

    A list reaches what lies below its own folder, so that the images appear there through a link. Raises `UserError`
    naming `option` where the classes cannot give equally many.
    """
    source = open_source(str(folder), option)
    if not source.classes:
        message = f"{option}: {folder} has no labels; kNN needs a folder of images for each class"
        raise UserError(message, code="no-labels")
    if source.packed:
        message = f"{option}: {folder} holds tar shards, which the peers cannot read; give a folder of image files"
        raise UserError(message, code="packed-images")
    if classes is not None and not 2 <= classes <= len(source.classes):
        number = len(source.classes)
        message = f"--classes: {classes} are asked for, but {folder} has {number} classes; give 2 to {number}"
        raise UserError(message, code="no-such-classes")
    names = source.classes[:classes]
    each = None if count is None else count // len(names)
    if count is not None and (count < 1 or count % len(names)):
        message = f"{option}: {count} is not a multiple of the {len(names)} classes; give one that is"
        raise UserError(message, code="unequal-classes")
    lines = []
    for label, name in enumerate(names):
        members = [index for index in range(len(source)) if source.labels[index] == label]
        if each is not None and len(members) < each:
            message = f"{option}: {each} images of each class are asked for, but {name} has {len(members)}; give less"
            raise UserError(message, code="too-few-images")
        lines += [f"{folder.name}/{source.path(i).relative_to(source.root)}\t{name}" for i in members[:each]]
    out.mkdir(parents=True, exist_ok=True)
    link = out / folder.name
    if link.is_symlink() and link.resolve() != folder.resolve():
        message = f"{option}: {link} leads to {link.resolve()}, another race's images; choose another --out"
        raise UserError(message, code="other-images")
    if not link.is_symlink():
        link.symlink_to(folder.resolve())
    path = out / f"{folder.name}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
