"""Folders, lists, labels and sizes, the sources of a config, and the refusals where there is nothing."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fastsiam.config import load_config
from fastsiam.data import demo_images
from fastsiam.data.decode import decode
from fastsiam.data.sources.open import check_labels, open_source, open_sources
from tests.support.refusals import refuses


def picture(path, size=(8, 6), color=(200, 30, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def names(source):
    return [os.fsdecode(bytes(name)) for name in source.names]


def test_programs_import_it_from_the_package():
    from fastsiam.data.sources import open_source as of_package

    assert of_package is open_source


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/readme.md").write_text("x")
    (tmp_path / "lost.txt").write_text("nowhere.jpg\n")
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "lists" / name)
    (tmp_path / "lists/half.txt").write_text("a.jpg\tx\n\nb.jpg\n")
    (tmp_path / "nothing.txt").write_text("\n")
    picture(tmp_path / "one.jpg")
    shutil.copy(tmp_path / "one.jpg", tmp_path / "one")
    (tmp_path / "zipped").mkdir()
    for name in ("images.zip", "zipped/images.zip"):
        (tmp_path / name).write_bytes(b"PK")
    for location, code, named in (
        ("absent", "absent", "absent"),
        ("empty", "no-images", "empty"),
        ("texts", "no-images", "readme.md"),
        ("lost.txt", "file-missing", "nowhere.jpg"),
        ("lists/half.txt", "label-missing", "line 3 (b.jpg)"),
        ("nothing.txt", "empty-list", "nothing.txt"),
        ("one.jpg", "is-image", "one.jpg"),
        ("one", "is-image", "one"),
        ("images.zip", "is-archive", "images.zip"),
        ("zipped", "no-images", "images.zip"),
    ):
        with refuses(code, "data.train") as error:
            open_source(str(tmp_path / location))
        assert named in str(error.value)


def test_sizes_are_those_displayed_and_read_once(photos):
    source = open_source(str(photos))
    everything = np.arange(len(source))
    sizes = source.sizes(everything)
    for index in everything:
        width, height = decode(source.path(index)).size
        assert sizes[index].tolist() == [height, width]
    turned = names(source).index("class1/turned.jpg")
    with Image.open(source.path(turned)) as raw:
        assert raw.size == (sizes[turned, 0], sizes[turned, 1])
        assert raw.size[0] != raw.size[1]
    source.path(0).rename(source.path(0).with_suffix(".away"))
    try:
        assert (source.sizes(everything[:1]) == sizes[:1]).all()
    finally:
        source.path(0).with_suffix(".away").rename(source.path(0))


def test_the_fingerprint_follows_names_and_sizes_not_the_root(tmp_path, photos):
    here = open_source(str(photos)).fingerprint()
    shutil.copytree(photos, tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint() == here
    picture(tmp_path / "moved/class0/extra.jpg")
    extra = open_source(str(tmp_path / "moved")).fingerprint()
    picture(tmp_path / "moved/class0/extra.jpg", size=(90, 90))
    assert len({here, extra, open_source(str(tmp_path / "moved")).fingerprint()}) == 3


def test_labels_that_cannot_serve_knn_are_refused(tmp_path, photos):
    train = open_source(str(photos))
    picture(tmp_path / "flat/1.jpg")
    picture(tmp_path / "other/class0/1.jpg")
    picture(tmp_path / "other/class9/1.jpg")
    with refuses("no-labels", "data.val"):
        check_labels(train, open_source(str(tmp_path / "flat")))
    with refuses("unknown-classes", "data.val"):
        check_labels(train, open_source(str(tmp_path / "other")))
    check_labels(train, train)


def quickstart(*overrides):
    return load_config("quickstart", overrides)


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    """A working folder in which the demo images of the quickstart are two a class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_images, "draw_demo", lambda root, seed, draw=demo_images.draw_demo: draw(root, seed, 2, 1))
    return tmp_path


def opened(config):
    """Lengths of the two sources, and what was warned and said."""
    warned, said = [], []
    train, val = open_sources(config, warned.append, said.append)
    return len(train), None if val is None else len(val), warned, said


def test_the_quickstart_draws_its_images_with_and_without_knn(drawing):
    assert opened(quickstart("data.val=null"))[:2] == (20, None)
    assert [path.name for path in (drawing / "data/demo").iterdir() if path.is_dir()] == ["train", "val"]
    length, val, warned, said = opened(quickstart())
    assert (length, val, warned, said) == (20, 10, [], []), "not drawn again"
    with refuses("demo-images", "data.demo_seed"):
        opened(quickstart("data.demo_seed=7"))


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("place", ["mine", "mine/train", "data/mine"])
def test_the_quickstart_takes_somebodys_own_images(drawing, photos, place, drawn):
    """With the demo images beside them or not: they are neither drawn nor taken for kNN, and one line says so."""
    if drawn:
        opened(quickstart())
    shutil.copytree(photos, drawing / place)
    length, val, warned, said = opened(quickstart(f"data.train={place}"))
    assert (length, val, said) == (16, None, [])
    assert [notice.code for notice in warned] == ["demo-validation" if drawn else "no-validation"]
    assert opened(quickstart(f"data.train={place}", "data.val=null")) == (16, None, [], [])
    assert opened(quickstart(f"data.train={place}", f"data.val={place}"))[:2] == (16, 16)
    assert (drawing / "data/demo").exists() == drawn


def test_a_folder_of_splits_is_trained_on_as_a_whole_with_a_notice(drawing):
    opened(quickstart())
    length, _, warned, _ = opened(quickstart("data.train=data/demo", "data.val=null"))
    assert (length, [notice.code for notice in warned]) == (30, ["trains-on-splits"])
    (drawing / "data/demo/cats").mkdir()
    assert opened(quickstart("data.train=data/demo", "data.val=null"))[2] == []


def test_demo_images_are_not_drawn_for_a_folder_that_is_missing(drawing):
    with refuses("absent", "data.train"):
        opened(quickstart("data.train=photos/train", "data.val=photos/val"))
    assert list(drawing.iterdir()) == []
    # Asked for, they are.
    assert opened(quickstart("data.train=x/train", "data.val=x/val", "data.demo_seed=3"))[:2] == (20, 10)


def test_a_list_of_demo_images_has_their_labels_for_knn(drawing):
    opened(quickstart())
    lines = [f"data/demo/train/{name}/00000.jpg\t{name}" for name in demo_images.CLASSES]
    (drawing / "some.txt").write_text("\n".join(lines))
    assert opened(quickstart("data.train=some.txt")) == (10, 10, [], [])
