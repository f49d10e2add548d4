"""Text lists as people, spreadsheets and other tools write them."""

import os
import time

import pytest
from PIL import Image

from fastsiam.data.sources.open import open_source
from tests.support.refusals import refuses

ROWS = [(f"{label}/{number}.jpg", label) for number in range(4) for label in ("dog", "cat")]
LABELS = [1, 0] * 4


@pytest.fixture
def folder(tmp_path):
    for number, (name, _) in enumerate(ROWS):
        picture(tmp_path / "d" / name, number)
    return tmp_path / "d"


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (number, 30, 90)).save(path)


def lines(form, **more):
    return "".join(
        form.format(p=name, c=label, b=name.replace("/", "\\"), i=int(label == "dog"), n=row, **more)
        for row, (name, label) in enumerate(ROWS)
    )


def names(source):
    return [os.fsdecode(bytes(name)) for name in source.names]


WAYS = {
    "tabs": (lines("{p}\t{c}\n\n"), "by list"),
    "crlf": (lines("{p}\t{c}\r\n"), "by list"),
    "utf-8 mark": (lines("{p}\t{c}\n").encode("utf-8-sig"), "by list"),
    "utf-16 little": (lines("{p}\t{c}\n").encode("utf-16"), "UTF-16"),
    "utf-16 big": (b"\xfe\xff" + lines("{p}\t{c}\n").encode("utf-16-be"), "UTF-16"),
    "utf-16 unmarked": (lines("{p}\t{c}\n").encode("utf-16-le"), "UTF-16-LE"),
    "csv": ("filename,label\n" + lines("{p},{c}\n"), "column label, separated by commas"),
    "csv of the file second": ('label,image\n' + lines('{c},"{p}"\n'), "column label, separated by commas"),
    "csv with an index": (",file_name,caption,label\n" + lines('{n},{p},"two, in\nthe sun",{c}\n'), "column label"),
    "csv without header": (lines("{p}, {c}\n"), "column 2, separated by commas"),
    "semicolons": ("Filename;Class\n" + lines("{p};{c}\n"), "column class, separated by semicolons"),
    "a spreadsheet's": ("sep=;\nfilename;label\n" + lines("{p};{c}\n"), "column label, separated by semicolons"),
    "numbers with words": ("path,label,class_name\n" + lines("{p},{i},{c}\n"), "column class_name"),
    "one other column": ("id,kind\n" + lines("{p},{c}\n"), "column kind"),
    "quotes": (lines('"{p}"\t"{c}"\n'), "by list"),
    "spaces": (lines("{p} {c}\n"), "column 2, separated by spaces"),
    "spaces and a box": (lines("{p}  {c} 0 0 62 4{n}\n"), "separated by spaces"),
    "label first": (lines("{c} {p}\n"), "column 1, separated by spaces"),
    "backslashes": (lines("{b}\t{c}\n"), "by list"),
    "a box": (lines("{p}\t{c}\t0\t0\t62\t4{n}\n"), "the column after the first tab"),
    "comments": ("# my list\n\n" + lines("{p}\t{c}\n"), "by list"),
    "json lines": (lines('{{"file_name": "{p}", "label": "{c}"}}\n'), "column label, JSON"),
    "a json array": ("[\n" + lines('{{"image": "{p}", "class": "{c}"}},\n')[:-2] + "]", "column class, JSON"),
    "relative to the folder above": (lines("d/{p}\t{c}\n"), "names below .."),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_list_is_read_as_it_is_written(folder, way):
    text, how = WAYS[way]
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    source = open_source(str(folder / "list.txt"))
    assert names(source) == [name for name, _ in ROWS]
    assert (source.root, source.classes, source.labels.tolist()) == (folder, ("cat", "dog"), LABELS)
    assert how in source.labelling
    # The same images, whatever their list looks like.
    (folder / "plain.txt").write_text(lines("{p}\n"))
    assert source.fingerprint() == open_source(str(folder / "plain.txt")).fingerprint()


def test_names_without_extension_are_found_in_the_one_folder_that_has_them(tmp_path):
    for number in range(4):
        picture(tmp_path / f"train/{number:04}.JPG", number)
    (tmp_path / "test").mkdir()
    (tmp_path / "labels.csv").write_text("id,breed\n" + "".join(f"{n:04},{'ab'[n % 2]}\n" for n in range(4)))
    source = open_source(str(tmp_path / "labels.csv"))
    assert names(source) == [f"train/{number:04}.JPG" for number in range(4)]
    assert (source.classes, source.labels.tolist()) == (("a", "b"), [0, 1, 0, 1])
    picture(tmp_path / "test/0000.JPG")
    with refuses("ambiguous-name", "data.train"):
        open_source(str(tmp_path / "labels.csv"))
    # One of the list's own name is meant.
    (tmp_path / "labels.csv").rename(tmp_path / "train.csv")
    assert names(open_source(str(tmp_path / "train.csv")))[0] == "train/0000.JPG"


def test_spaces_belong_to_a_name_where_the_file_has_them(tmp_path):
    for name in ("a b.jpg", "a.jpg", "a b c.jpg"):
        picture(tmp_path / name)
    (tmp_path / "labelled.txt").write_text("a b.jpg 3\na.jpg 12\na b c.jpg  3\n")
    (tmp_path / "plain.txt").write_text("a b.jpg\na.jpg\na b c.jpg\n")
    labelled, plain = (open_source(str(tmp_path / f"{name}.txt")) for name in ("labelled", "plain"))
    assert names(labelled) == names(plain) == ["a b.jpg", "a.jpg", "a b c.jpg"]
    assert (labelled.classes, labelled.labels.tolist()) == (("12", "3"), [1, 0, 1])
    assert plain.classes == ()


def test_absolute_names_become_relative_to_the_list_or_to_their_common_folder(folder, tmp_path, monkeypatch):
    (folder / "list.txt").write_text(lines("{root}/{p}\t{c}\n", root=folder))
    inside = open_source(str(folder / "list.txt"))
    assert (inside.root, names(inside)) == (folder, [name for name, _ in ROWS])
    (tmp_path / "lists").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for form in (f"{folder}/{{p}}\t{{c}}\n", "~/d/{p}\t{c}\n", "../d/{p}\t{c}\n"):
        (tmp_path / "lists/all.txt").write_text(lines(form))
        outside = open_source(str(tmp_path / "lists/all.txt"))
        assert (outside.root, names(outside), outside.labels.tolist()) == (folder, names(inside), LABELS)
        assert outside.fingerprint() == inside.fingerprint()


def test_lines_that_name_a_file_again_count_in_a_plain_list_and_not_in_a_table_of_boxes(folder):
    (folder / "plain.txt").write_text("cat/0.jpg\tcat\ncat/../cat/0.jpg\tcat\ncat/0.jpg\tcat\n")
    source = open_source(str(folder / "plain.txt"))
    assert names(source) == ["cat/0.jpg", "cat/../cat/0.jpg", "cat/0.jpg"]
    assert "1 line names a file again" in source.label_text()
    (folder / "plain.txt").write_text("cat/0.jpg\n" * 3)
    assert "2 lines name a file again" in open_source(str(folder / "plain.txt")).label_text()
    table = "file,xmin,label\ncat/0.jpg,1,cat\ncat/0.jpg,2,cat\ndog/0.jpg,3,dog\n"
    (folder / "boxes.csv").write_text(table)
    source = open_source(str(folder / "boxes.csv"))
    assert (names(source), source.labels.tolist()) == (["cat/0.jpg", "dog/0.jpg"], [0, 1])
    assert "(1 repeat one)" in source.labelling
    (folder / "boxes.csv").write_text(table + "cat/0.jpg,4,dog\n")
    source = open_source(str(folder / "boxes.csv"))
    assert (len(source), source.classes) == (2, ())
    assert source.labelling == "line 5 of boxes.csv gives cat/0.jpg another label than line 2"


def test_names_that_are_not_utf_8_are_those_of_the_files(tmp_path):
    raw = "Möwe 1.jpg".encode("cp437")
    picture(tmp_path / os.fsdecode(raw))
    picture(tmp_path / "Kühe.jpg")
    (tmp_path / "bytes.txt").write_bytes(raw + b"\nK\xc3\xbche.jpg\n")
    assert open_source(str(tmp_path / "bytes.txt")).names.tolist() == [raw, "Kühe.jpg".encode()]
    (tmp_path / "windows.txt").write_bytes("Kühe.jpg\r\n".encode("cp1252"))
    assert names(open_source(str(tmp_path / "windows.txt"))) == ["Kühe.jpg"]


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("filename,label\ncat/0.jpg,cat\ncat/9.jpg,cat\n", "file-missing", "line 3"),
        ("cat/0.jpg\n\ncat\n", "folder-in-list", "line 3"),
        ("cat/0.jpg\nC:\\photos\\1.jpg\n", "file-missing", "line 2"),
        ('{"images": [{"id": 3}], "annotations": []}\n', "bad-list", "line 1"),
        ('{"file_name": "cat/0.jpg"}\n{"file_name"\n', "bad-list", "line 2"),
        ("cat/0.jpg\t1\ncat/1.jpg\t\n", "label-missing", "line 2"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "is-image", ""),
        (b"\x80\x02}q\0.", "not-a-list", ""),
        (b"\xff\xfea", "not-a-list", "UTF-16"),
        ("# nothing\n", "empty-list", ""),
        ("cat/0.jpg\n" + "x" * 5000 + ".jpg\n", "file-missing", "line 2"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(folder, text, code, line):
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refuses(code, "data.train") as error:
        open_source(str(folder / "list.txt"))
    assert line in str(error.value)
    assert len(str(error.value)) <= 300 + len(str(folder))


def test_a_table_without_labels_says_which_columns_it_has(folder):
    (folder / "metadata.csv").write_text("file_name,caption,width\n" + lines("{p},photo {n},8\n"))
    source = open_source(str(folder / "metadata.csv"))
    assert (len(source), source.classes) == (8, ())
    assert "metadata.csv has no column label (file_name, caption, width)" in source.labelling


def test_a_long_list_is_read_by_one_look_at_each_file(folder, monkeypatch):
    looked_at = []
    real = os.stat
    (folder / "list.txt").write_text(lines("{p}\t{c}\n") * 500)
    monkeypatch.setattr(os, "stat", lambda path, **more: looked_at.append(path) or real(path, **more))
    began = time.perf_counter()
    assert len(open_source(str(folder / "list.txt"))) == 4000
    assert len([path for path in looked_at if str(path).endswith("jpg")]) == 4000
    assert time.perf_counter() - began < 2
