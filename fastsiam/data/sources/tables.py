"""Reader of text files that name images: encoding, separator, header, and the columns of file names and labels.

The files that exist decide how lines are split: the way that finds the most files in the first lines reads all lines.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastsiam.errors import UserError, printable

# Columns of file names, the likeliest first.
FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "file_path", "filepath", "image_path", "image_file", "image_name",
    "image", "img", "img_path", "image_id", "imageid", "id", "name",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "class", "cls", "category", "target", "class_name", "classname", "label_name", "category_name",
    "class_label", "class_id", "label_id", "category_id", "wnid", "synset", "species", "breed",
)  # fmt: skip
# Columns with names of classes whose numbers another column gives.
_WORDS = ("class_name", "classname", "label_name", "category_name", "class", "category", "label", "wnid", "synset")
_SEPARATORS = {None: "a path a line", "\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", " ": "spaces"}
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_IMAGE_LIKE = re.compile(r"[\\/]|\.(jpe?g|png|bmp|webp|tiff?|gif)$", re.IGNORECASE)
_NUMBER = re.compile(r"(-?\d+)(?:\.0+)?", re.ASCII)
# Number of lines that decide how all are read.
_SAMPLE = 200
_SHOWN = 60

Find = Callable[[str], object | None]


class Entries(NamedTuple):
    """Images that a text file names, in its order."""

    found: list
    """Result of `find` for each; None where there is no such file."""
    names: list[str]
    """Names as written."""
    lines: list[int]
    """Line numbers, from 1 on."""
    columns: dict[str, list[str]]
    """Columns that may hold labels, by name (`column 2` without a header); "" where a line has none."""
    header: tuple[str, ...]
    """Empty without one."""
    how: str
    """Separator and encoding in words; empty for a path a line with a label after a tab in UTF-8."""


def read_text(path: Path, key: str) -> tuple[str, str]:
    """Returns the text of a file and the name of its encoding; raises `UserError` where it is not a text.

    Bytes that are not UTF-8 become lone surrogates, as in Python's file names.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {shown(path)} cannot be read ({error.strerror})", "unreadable") from None
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None) or _without_mark(data)
    if encoding is None:
        raise UserError(f"{key}: {shown(path)} is neither a folder nor a text file with a path a line", "not-a-list")
    try:
        text = data.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        sentence = f"{key}: {shown(path)} begins as {encoding.upper()} and is not ({error.reason}); save it as UTF-8"
        raise UserError(sentence, "not-a-list") from None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, encoding


def read_entries(text: str, encoding: str, find: Find) -> Entries:
    """Splits all lines in the way that finds the most files in the first ones.

    `find(name)` returns an object for the image, or None. Raises `ValueError` naming the line that is not JSON or CSV.
    """
    how = "" if encoding == "utf-8-sig" else encoding.upper()
    # A first line for spreadsheets.
    text = re.sub(r"\A\s*sep=.[ \t]*\n", "\n", text)
    if text.lstrip().startswith(("{", "[")) and find(text.partition("\n")[0]) is None:
        return _of_json(text, find, how)
    head = "\n".join(text.split("\n", _SAMPLE)[:_SAMPLE])
    best = max(_SEPARATORS, key=lambda separator: _known(head, separator, find))
    sample = [fields for _, fields in _rows(head, best, find)]
    rows, header = _rows(text, best, find), ()
    if best is not None and sample and _is_header(sample[0], find):
        header = tuple(_column_name(field) for field in next(rows)[1])
    entries = _collect(rows, _file_column(sample, header, find), header, find)
    if best not in (None, "\t") or header:
        how = ", ".join(filter(None, (f"separated by {_SEPARATORS[best]}" if best else "", how)))
    return entries._replace(how=how)


def label_values(entries_columns: dict[str, list[str]]) -> tuple[list[str], str, list[str]] | None:
    """Returns the values of the label column, its name, and the classes in their order; None where there is none.

    The first of `LABEL_COLUMNS` counts. Where it holds whole numbers and another one a word for each of them, the words
    are the classes, in the order of the numbers.
    """
    present = [name for name in LABEL_COLUMNS if any(entries_columns.get(name, ()))] or [
        name for name in entries_columns if any(entries_columns[name])
    ][:1]
    if not present:
        return None
    name = present[0]
    values = [whole_number(value) for value in entries_columns[name]]
    classes = sorted_classes(values)
    if is_numbered(classes):
        for other in _WORDS:
            words = entries_columns.get(other)
            pairs = set(zip(values, words, strict=True)) if words and other != name else set()
            pairs.discard(("", ""))
            known = dict(pairs)
            if pairs and len(pairs) == len(known) == len(set(known.values())) and not is_numbered(known.values()):
                return [known.get(value, "") for value in values], other, [known[number] for number in classes]
    return values, name, classes


def sorted_classes(values: Iterable[str]) -> list[str]:
    """Returns the values that occur, numbers by size and words by letters; "" is not a class."""
    found = set(values) - {""}
    return sorted(found, key=int) if is_numbered(found) else sorted(found)


def is_numbered(values: Iterable[str]) -> bool:
    """True where there are values and all are whole numbers."""
    values = list(values)
    return bool(values) and all(_NUMBER.fullmatch(value) for value in values)


def whole_number(value: str) -> str:
    """Returns `3` for `3.0`, which tables write for a 3 beside an empty cell; other values unchanged."""
    match = _NUMBER.fullmatch(value)
    return match[1] if match else value


def shown(text: object, most: int = _SHOWN) -> str:
    """Returns the last `most` characters of a name for a message; the end of a path says more than its beginning."""
    text = printable(str(text))
    return text if len(text) <= most else "..." + text[3 - most :]


def json_text(value: object) -> str:
    """Returns a label in JSON as text, also from a list of one; "" for anything but a word or a whole number."""
    if isinstance(value, list) and len(value) == 1:
        return json_text(value[0])
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return whole_number(str(value).strip())


def _without_mark(data):
    """Returns UTF-8, or UTF-16 without its mark, which has a zero in every second byte of Latin text."""
    head = data[:4096]
    if b"\0" not in head:
        return "utf-8-sig"
    for encoding, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if zeros.count(0) > 0.8 * len(zeros) and not others.count(0):
            return encoding
    return None


def _objects(text) -> Iterator[tuple[int, dict]]:
    """Yields number and fields of each JSON object: one a line, or the elements of an array."""
    if text.lstrip().startswith("["):
        try:
            values = enumerate(json.loads(text), 1)
        except ValueError as error:
            raise ValueError(f"line {getattr(error, 'lineno', 1)} is not JSON") from None
    else:
        values = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, value in values:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        yield number, {str(name).lower(): known for name, known in value.items()} if isinstance(value, dict) else {}


def _of_json(text, find, how):
    found, names, lines, objects = [], [], [], []
    for number, fields in _objects(text):
        name = next((fields[name] for name in FILE_COLUMNS if isinstance(fields.get(name), str)), None)
        if name is None:
            raise ValueError(f"line {number} is not a JSON object with a file_name")
        found.append(find(name))
        names.append(name)
        lines.append(number)
        objects.append(fields)
    header = tuple(dict.fromkeys(name for fields in objects[:_SAMPLE] for name in fields))
    columns = {name: [json_text(fields.get(name)) for fields in objects] for name in LABEL_COLUMNS if name in header}
    return Entries(found, names, lines, columns, header, ", ".join(filter(None, ("JSON", how))))


def _known(text, separator, find):
    """Returns the share of these lines that name a file in one column, and True where all have as many fields."""
    rows = [fields for _, fields in _rows(text, separator, find)]
    if not rows:
        return 0, False
    column = _file_column(rows, (), find)
    known = sum(column < len(fields) and find(fields[column]) is not None for fields in rows)
    return known / len(rows), separator in ("\t", ",", ";") and {len(fields) for fields in rows} == {
        max(2, len(rows[0]))
    }


def _file_column(rows, header, find):
    """Returns the column in which the most fields are files."""
    width = max((len(fields) for fields in rows), default=1)
    named = [header.index(name) for name in FILE_COLUMNS if name in header]
    order = named + [column for column in range(width) if column not in named]
    return max(order, key=lambda column: sum(column < len(row) and find(row[column]) is not None for row in rows))


def _rows(text, separator, find) -> Iterator[tuple[int, list[str]]]:
    """Yields line number and fields of each line that is neither empty nor a comment."""
    if separator in (None, " "):
        split = _SpaceSplitter(find) if separator else lambda line: [line]
        for number, line in enumerate(text.split("\n"), 1):
            line = line.strip()
            if line and not (line.startswith("#") and find(line) is None):
                yield number, split(line)
        return
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    number = 0
    try:
        for fields in reader:
            number, began = reader.line_num, number + 1
            fields = [field.strip() for field in fields]
            if any(fields) and not (fields[0].startswith("#") and find(fields[0]) is None):
                yield began, fields
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None


class _SpaceSplitter:
    """Splitter at spaces of a line whose file name may have some; the longest beginning that is a file is the name."""

    def __init__(self, find: Find):
        self._find, self._after = find, 1

    def __call__(self, line: str) -> list[str]:
        places = [match.span() for match in re.finditer(r"\s+", line)]
        # The last line's number of fields after the name is tried first.
        order = sorted(range(len(places) + 1), key=lambda after: (after != self._after, after))
        for after in order:
            begin, end = places[-after] if after else (len(line), len(line))
            if after <= len(places) and self._find(line[:begin]) is not None:
                self._after = after
                return [line[:begin], *line[end:].split()]
        return line.split()


def _is_header(fields, find):
    """True for a first line that names columns: some names are known, and no field is or looks like a file."""
    if any(find(field) is not None or _IMAGE_LIKE.search(field) for field in fields):
        return False
    return not {_column_name(field) for field in fields}.isdisjoint(FILE_COLUMNS + LABEL_COLUMNS)


def _column_name(field):
    return re.sub(r"[\s-]+", "_", field.strip().lower())


def _collect(rows, column, header, find):
    found, names, lines, kept = [], [], [], []
    for number, fields in rows:
        name = fields[column] if column < len(fields) else ""
        found.append(find(name) if name else None)
        names.append(name)
        lines.append(number)
        kept.append(fields)
    if header:
        chosen = {name: place for place, name in enumerate(header) if name in LABEL_COLUMNS and place != column}
        others = [place for place in range(len(header)) if place != column]
        if not chosen and len(others) == 1 and _repeats(kept, others[0]):
            chosen = {header[others[0]]: others[0]}
    else:
        width = max(map(len, kept), default=0)
        place = column + 1 if column + 1 < width else column - 1
        chosen = {f"column {place + 1}": place} if 0 <= place < width else {}
    columns = {name: [row[place] if place < len(row) else "" for row in kept] for name, place in chosen.items()}
    return Entries(found, names, lines, columns, header, "")


def _repeats(rows, place):
    """True where the values of a column occur twice on average, as classes do and captions do not."""
    values = [row[place] for row in rows if place < len(row)]
    return len(values) >= 2 * len(set(values))
