"""Image files of a text list: a path a line, CSV, TSV or JSON lines, with labels or without."""

import os
import stat
import unicodedata
from dataclasses import replace
from itertools import islice
from pathlib import Path

from fastsiam.data.sources.folder import is_outside
from fastsiam.data.sources.labels import Labelling, by_values
from fastsiam.data.sources.source import ImageSource, new_source
from fastsiam.data.sources.tables import Entries, label_values, read_entries, read_text, shown
from fastsiam.errors import UserError

# Extensions tried for a name without one.
_USUAL = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
# Most folders beside a list in which its names are looked for.
_FOLDERS = 50


def source_of_list(path: Path, key: str) -> ImageSource:
    """Returns the files in the list's order; `key` is the config key that errors name.

    A path a line, relative to the list's folder, with a label after a tab, is read literally. Where a line is not a
    file, the list is read as a table (`fastsiam.data.sources.tables`). Its names may also be absolute, begin with `~`,
    have backslashes, lack the extension, or be relative to another folder. The root is the list's folder, or the common
    folder of all files where some lie outside.
    """
    text, encoding = read_text(path, key)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{key}: the list {path} is empty; write a path a line", "empty-list")
    found = _as_it_stands(path.parent, lines) if encoding == "utf-8-sig" else None
    if found is None:
        return _of_table(path, text, encoding, key)
    given = [line.partition("\t")[2].partition("\t")[0].strip() for line in lines]
    how = f"by {path.name}" + (", the column after the first tab" if lines[0].count("\t") > 1 else "")
    numbers = (number for number, line in enumerate(text.split("\n"), 1) if line.strip())
    source = _with_labels(path, path.parent, found, given, numbers, key, how)
    repeated = len(found) - len(set(found))
    if not repeated:
        return source
    again = f"{repeated:,} {'line names' if repeated == 1 else 'lines name'} a file again, which counts each time"
    return replace(source, labelling="; ".join(filter(None, (source.labelling, again))))


def _as_it_stands(folder, lines):
    """Returns name and size of each line's file; None where one is not a file below the folder."""
    found, base = [], f"{folder}/"
    for line in lines:
        name = line.partition("\t")[0].strip()
        try:
            status = os.stat(base + name)
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode) or name.startswith("/") or (".." in name and is_outside(name)):
            return None
        found.append((name, status.st_size))
    return found


def _of_table(path, text, encoding, key):
    places = _Places(path)
    try:
        entries = places.learn(text, encoding)
    except ValueError as error:
        raise UserError(f"{key}: {shown(path)}: {error}", "bad-list") from None
    if not entries.found:
        raise UserError(f"{key}: the list {path} names no files; write a path a line", "empty-list")
    if None in entries.found:
        raise _lost(path, entries, places, key)
    found, lines = entries.found, entries.lines
    root = path.parent
    if any(is_outside(name) for name, _ in found):
        root, found = _below_common_folder(root, found)
    how = ", ".join(filter(None, (entries.how, places.how)))
    chosen = label_values(entries.columns)
    if chosen is None:
        reason = f"{path.name} has no column label ({shown(', '.join(entries.header))})" if entries.header else ""
        unlabelled = Labelling([-1] * len(found), (), ", ".join(filter(None, (reason, how))))
        return new_source(root, found, unlabelled)
    labels, column, _ = chosen
    by = ", ".join(filter(None, (f"by {path.name}, column {column.removeprefix('column ')}", how)))
    if not entries.header:
        return _with_labels(path, root, found, labels, lines, key, by)
    return _once_each(root, found, labels, lines, path, by)


def _once_each(root, found, labels, lines, path, by):
    """Keeps the first of several lines that name one file, as lists of boxes do; drops labels where they differ."""
    first, conflict = {}, ""
    for (name, size), label, line in zip(found, labels, lines, strict=True):
        known = first.setdefault(name, (size, label, line))
        if known[1] != label and not conflict:
            conflict = f"line {line} of {path.name} gives {shown(name)} another label than line {known[2]}"
    found = [(name, size) for name, (size, _, _) in first.items()]
    if conflict:
        return new_source(root, found, labelling=Labelling([-1] * len(found), (), conflict))
    repeated = len(lines) - len(first)
    by += f", a file's first line of several ({repeated:,} repeat one)" if repeated else ""
    return new_source(root, found, _labelled([label for _, label, _ in first.values()], by))


def _with_labels(path, root, found, given, lines, key, how):
    """Returns a source with one label a line, or none."""
    if any(given) and not all(given):
        place = given.index("")
        line, name = next(islice(lines, place, None)), shown(found[place][0])
        sentence = f"{key}: in {shown(path)} some lines have a label, but line {line} ({name}) has none; add it"
        raise UserError(sentence, "label-missing")
    return new_source(root, found, _labelled(given, how))


def _labelled(given, how):
    """Labels in the order of the words as written; quotes around all of them are dropped from the classes."""
    words = sorted(set(given) - {""})
    labelling = by_values(given, how if words else "", words)
    plain = tuple(word[1:-1] if len(word) > 2 and word[0] == word[-1] == '"' else word for word in words)
    return labelling._replace(classes=plain) if len(set(plain)) == len(words) else labelling


class _Places:
    """Finder of the files that a list names."""

    def __init__(self, path: Path):
        self._path, self._folder = path, str(path.parent)
        self._before, self._after = "", ""
        self.how = ""
        """The base of the names in words, where it is not the list's folder."""
        self.fitting: list[str] = []
        """Folders that have files of these names."""

    def learn(self, text: str, encoding: str) -> Entries:
        """Reads all lines, below the folder that has files of their names."""
        head = "\n".join(text.split("\n", 50)[:50])
        if not any(found is not None for found in read_entries(head, encoding, self.find).found):
            self._before = self._folder_of(head, encoding)
            self.how = f"names below {self._before.rstrip('/')}" if self._before else ""
        entries = read_entries(text, encoding, self.find)
        if self._after:
            self.how = ", ".join(filter(None, (self.how, f"names without {self._after}")))
        return entries

    def find(self, name: str) -> tuple[str, int] | None:
        """Returns the relative or absolute name of a file and its size in bytes; None where it does not exist."""
        if not name:
            return None
        exact = self._size(self._before + name + self._after)
        if exact is not None:
            return exact
        for variant in self._variants(name):
            for after in ("", *_USUAL, *(extension.upper() for extension in _USUAL)):
                found = self._size(variant + after)
                if found is not None:
                    if after:
                        self._after = after
                    return found
                if "." in variant.rpartition("/")[2]:
                    break
        return None

    def _variants(self, name):
        forms = [name]
        if name.startswith("~"):
            forms.append(os.path.expanduser(name))
        if "\\" in name:
            forms.append(name.replace("\\", "/"))
        if len(name) > 2 and name[0] == name[-1] and name[0] in "'\"":
            forms.append(name[1:-1])
        if not name.isascii():
            forms += [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
            forms.append(os.fsencode(name).decode("cp1252", "replace"))
        return [form if form.startswith("/") else self._before + form for form in dict.fromkeys(forms)]

    def _size(self, name):
        try:
            status = os.stat(name if name.startswith("/") else f"{self._folder}/{name}")
        except (OSError, ValueError):
            return None
        return (name, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def _folder_of(self, head, encoding):
        """Returns the one folder beside the list, or above it, that has the files; "" for none."""
        folders = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.is_dir() and not entry.name.startswith("."):
                    folders.append(f"{entry.name}/")
        same = f"{self._path.stem}/"
        folders = sorted(folders, key=lambda name: (name != same, name))[:_FOLDERS]
        fitting = self.fitting
        for before in (*folders, "../", f"{os.getcwd()}/"):
            self._before, self._after = before, ""
            if (before in folders or not fitting) and any(read_entries(head, encoding, self.find).found):
                fitting.append(before)
                if before == same:
                    break
        self._after = ""
        return fitting[0] if len(fitting) == 1 else ""


def _lost(path, entries, places, key):
    place = entries.found.index(None)
    name, line = shown(entries.names[place]), entries.lines[place]
    if os.path.isdir(os.path.join(path.parent, entries.names[place])):
        return UserError(
            f"{key}: line {line} of {shown(path)} lists {name}, a folder; list its images", "folder-in-list"
        )
    if len(places.fitting) > 1:
        several = " and in ".join(places.fitting[:2])
        sentence = f"{key}: line {line} of {shown(path)} lists {name}, which is in {several}; write the folders"
        return UserError(sentence, "ambiguous-name")
    where = shown(path.parent / entries.names[place] if not entries.names[place].startswith("/") else name, 100)
    return UserError(f"{key}: line {line} of {shown(path)} lists {name}, but there is no {where}", "file-missing")


def _below_common_folder(folder, found):
    """Returns the common folder of all files, and their names below it."""
    absolute = [os.path.normpath(os.path.join(os.path.abspath(folder), name)) for name, _ in found]
    inside = os.path.abspath(folder)
    root = inside if all(name.startswith(inside + "/") for name in absolute) else None
    root = root or os.path.commonpath([os.path.dirname(name) for name in absolute])
    cut = len(root.rstrip("/")) + 1
    names = [(name[cut:], size) for name, (_, size) in zip(absolute, found, strict=True)]
    return (folder if root == inside else Path(root)), names
