"""Labels of folders: class folders with something beside them, and the files that data sets come with."""

import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image

from fastsiam.data.sources.index_cache import cache_folder
from fastsiam.data.sources.open import check_labels, open_source
from fastsiam.evaluate.online import OnlineEvaluation
from fastsiam.methods import build_method
from fastsiam.runtime.runtime import Runtime
from tests.support.files import LONG_AGO, settle
from tests.support.refusals import refuses


def pictures(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name, "PNG")


def words(source):
    """The word of each image's label, by its name."""
    given = [source.classes[label] if label >= 0 else "" for label in source.labels]
    return dict(zip(map(os.fsdecode, source.names.tolist()), given, strict=True))


FOLDERS = {
    "a stray picture": ("preview.png cat/1.png cat/2.png dog/3.png", ",cat,cat,dog"),
    "as many beside as in them": ("1.png 2.png cat/1.png dog/1.png", ",,,"),
    "more beside than in them": ("1.png 2.png 3.png 4.png cat/1.png dog/1.png", ",,,,,"),
    "below one folder": ("images/cat/1.png images/dog/2.png images/fox/3.png", "cat,dog,fox"),
    "below one folder, and a stray": ("images/cat/1.png images/dog/2.png logo.png", "cat,dog,"),
    "images in each": ("n01/images/1.JPEG n02/images/2.JPEG", "n01,n02"),
    "splits with classes": ("train/cat/1.png train/dog/2.png val/cat/3.png", "cat,dog,cat"),
    "splits with a year": ("Train2017/cat/1.png Train2017/dog/2.png val2017/cat/3.png", "cat,dog,cat"),
    "splits alone": ("train/1.png val/2.png", "train,val"),
    "one folder": ("only/1.png only/2.png", ","),
    "none": ("1.png 2.png", ","),
    "deeper": ("ape/1.png zebra/2.png zebra/deeper/3.png", "ape,zebra,zebra"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_class_folders(tmp_path, case):
    """Labels are numbered in the order of the folders' names."""
    names, expected = FOLDERS[case]
    pictures(tmp_path / "d", *names.split())
    source = open_source(str(tmp_path / "d"))
    assert words(source) == dict(zip(names.split(), expected.split(","), strict=True))
    assert source.classes == () or source.labelling == "by folder"
    assert list(source.classes) == sorted(source.classes)
    if "" in words(source).values() and source.classes:
        assert "1 image has none" in source.label_text()


ROWS = [("0.png", "cat"), ("1.png", "dog"), ("2.png", "cat")]


def table(form):
    return "".join(form.format(name=name, stem=name[:-4], label=label) for name, label in ROWS)


TINY = table("{name}\t{label}\t0\t32\t44\t62\n")
HUB = "file_name,text,label\n" + table('images/{name},"a, b",{label}\n')
ABOVE = "path,class\ntrain/0.png,fox\n" + table("val/{name},{label}\n")
NUMBERS = "image,target,class_name\n0.png,7,cat\n1.png,12,dog\n2.png,7,cat\n"
ANNOTATIONS = {
    "tiny imagenet": ("val/images/", "val/val_annotations.txt", TINY, "column 2"),
    "below images": ("val/images/", "val/images/val_annotations.txt", TINY, "column 2"),
    "hub": ("val/images/", "val/metadata.csv", HUB, "label"),
    "json lines": ("val/", "val/metadata.jsonl", table('{{"file_name": "{name}", "label": "{label}"}}\n'), "label"),
    "kaggle": ("val/", "val.csv", "id,breed\n" + table("{stem},{label}\n"), "column breed"),
    "from above": ("val/", "labels.csv", ABOVE, "1 of its lines"),
    "spaces": ("val/", "val/labels.txt", table("{name} {label}\n"), "spaces"),
    "numbers": ("val/", "val/annotations.csv", NUMBERS, "class_name"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_files_of_annotations(tmp_path, case):
    folder, file, text, how = ANNOTATIONS[case]
    pictures(tmp_path / folder, *(name for name, _ in ROWS))
    (tmp_path / file).write_text(text)
    source = open_source(str(tmp_path / "val"))
    assert [word for _, word in sorted(words(source).items())] == ["cat", "dog", "cat"]
    assert source.labelling.startswith(f"by {os.path.basename(file)}")
    assert how in source.labelling
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 1, 0])


def test_an_image_that_annotations_do_not_name_is_without_a_label(tmp_path):
    pictures(tmp_path / "d", "0.png", "1.png", "2.png")
    (tmp_path / "d/labels.csv").write_text("file,label\n0.png,cat\n2.png,dog\n9.png,dog\n")
    source = open_source(str(tmp_path / "d"))
    assert words(source) == {"0.png": "cat", "1.png": "", "2.png": "dog"}
    assert "1.png" in source.label_text()


def test_a_file_counts_more_than_folders_of_splits(tmp_path):
    pictures(tmp_path / "d", "train/0.png", "train/1.png", "test/2.png")
    (tmp_path / "d/train.csv").write_text("id,label\n0,a\n1,b\n")
    assert words(open_source(str(tmp_path / "d"))) == {"test/2.png": "", "train/0.png": "a", "train/1.png": "b"}


def test_class_folders_count_more_than_a_file(tmp_path):
    pictures(tmp_path / "d", "cat/0.png", "dog/1.png")
    (tmp_path / "d/metadata.csv").write_text("file_name,label\ncat/0.png,x\ndog/1.png,y\n")
    source = open_source(str(tmp_path / "d"))
    assert (source.classes, source.labelling) == (("cat", "dog"), "by folder, not by metadata.csv")


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("metadata.csv", "file_name,text\n0.png,a\n1.png,b\n", "metadata.csv .*file_name, text"),
        ("labels.csv", "file,label\n7.png,a\n", "labels.csv"),
        ("labels.csv", "file,label\n0.png,a\n0.png,b\n", "labels.csv: line 3 .* line 2"),
        ("metadata.jsonl", "{broken\n", "metadata.jsonl: line 1"),
        ("ILSVRC2012_validation_ground_truth.txt", "490\n361\n", "ILSVRC2012_validation_ground_truth.txt"),
        ("species.csv", "0.png,a\n1.png,b\n", "data.val=.*species.csv"),
    ],
)  # fmt: skip
def test_what_gives_no_labels_is_named_where_knn_needs_them(tmp_path, file, text, reason):
    pictures(tmp_path / "train", "cat/0.png", "dog/1.png")
    pictures(tmp_path / "val", "0.png", "1.png")
    (tmp_path / "val" / file).write_text(text)
    train, val = open_source(str(tmp_path / "train")), open_source(str(tmp_path / "val"), "data.val")
    assert len(val) == 2
    with refuses("no-labels", "data.val") as error:
        check_labels(train, val)
    assert re.search(reason, str(error.value))
    assert len(str(error.value)) <= 300


def test_numbers_do_not_meet_words(tmp_path):
    pictures(tmp_path / "train", "cat/0.png", "dog/1.png")
    pictures(tmp_path / "val", "0/0.png", "1/1.png")
    with refuses("labels-differ", "data.val"):
        check_labels(open_source(str(tmp_path / "train")), open_source(str(tmp_path / "val")))


@pytest.mark.parametrize("place", ["d/labels.csv", "d.csv"])
def test_the_kept_list_ends_with_a_change_of_the_annotations(tmp_path, place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures(tmp_path / "d", "0.png", "1.png")
    settle(tmp_path / "d")

    def classes():
        classes = open_source(str(tmp_path / "d")).classes
        assert (cache_folder(tmp_path / "d") / "index/index.json").exists()
        return classes

    assert classes() == ()
    for number, (first, second) in enumerate([("cat", "dog"), ("ant", "dog")]):
        (tmp_path / place).write_text(f"file,label\n0.png,{first}\n1.png,{second}\n")
        for path in (tmp_path / place, tmp_path / "d"):
            os.utime(path, (LONG_AGO + number, LONG_AGO + number))
        assert classes() == (first, second)
    kept = json.loads((cache_folder(tmp_path / "d") / "index/index.json").read_text())
    assert kept["labelling"].startswith(f"by {os.path.basename(place)}")


@pytest.mark.slow
def test_images_without_a_label_are_trained_on_and_do_not_vote(tiny_config, demo_folder, tmp_path):
    """kNN of a set with strays is that of the set without them."""
    accuracies = []
    for stray in (False, True):
        root = tmp_path / f"data{stray}"
        shutil.copytree(demo_folder, root)
        if stray:
            for part in ("train", "val"):
                pictures(root / part, "aaa.png", "zzz.png")
        config = tiny_config(f"data.train={root}/train", f"data.val={root}/val", "data.backend=pil")
        train, val = open_source(f"{root}/train"), open_source(f"{root}/val")
        assert len(train) == 80 + 2 * stray
        torch.manual_seed(0)
        method = build_method(config)
        online = OnlineEvaluation(config, train, val, (None, None), Runtime.of(config.train))
        accuracies.append(online.knn(method.encoder))
    assert accuracies[0] == accuracies[1] > 0
