"""Lists of labelled images: balance and order against a loop, and lists read back."""

import numpy as np
import pytest

from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data import rng
from fastsiam.data.build import open_training_loader
from fastsiam.data.labelled_subset import balanced, listed, share_of_labels, write_list
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.open import open_source
from tests.support.refusals import refuses


def dealt(labels, share, seed):
    """Rounds of one image from each class that has any left; in the last round classes in the order of their keys."""
    keys, class_keys = rng.subset_keys(seed, len(labels)), rng.subset_keys(seed, max(labels) + 1)
    left = {}
    for index in sorted(range(len(labels)), key=lambda index: keys[index]):
        if labels[index] >= 0:
            left.setdefault(int(labels[index]), []).append(index)
    total, chosen = max(round(share * sum(map(len, left.values()))), len(left)), []
    while len(chosen) < total:
        for number in sorted(left, key=lambda number: class_keys[number]):
            if left[number] and len(chosen) < total:
                chosen.append(left[number].pop(0))
    return sorted(chosen)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("seed", [0, 7])
def test_subsets_are_those_of_a_loop(share, seed):
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(-1, 9), generator.integers(1, 300, 10))
    labels = generator.permutation(labels[labels != 4])
    assert balanced(labels, share, seed).tolist() == dealt(labels, share, seed)


def test_classes_of_imagenets_sizes_give_as_many_images_as_in_simclrs_lists():
    """12 or 13 a class of 1 %, 128 or 129 of 10 %, where classes have 732 to 1,300 images."""
    sizes = np.append(np.linspace(732, 1300, 55).astype(int), [1300] * 45)
    sizes[-1] -= sizes.sum() - 114_200
    labels = np.repeat(np.arange(100), sizes)
    share = 12.81 / 1142
    few, more, others = balanced(labels, share, 0), balanced(labels, 10 * share, 0), balanced(labels, share, 1)
    assert (len(few), len(more)) == (1281, 12_810)
    assert set(np.bincount(labels[few])) == {12, 13}
    assert set(np.bincount(labels[more])) == {128, 129}
    assert np.isin(few, more).all()
    assert len(np.intersect1d(few, others)) < 100


def test_a_share_of_less_than_an_image_a_class_is_said(demo_folder):
    source = open_source(str(demo_folder / "train"))
    subset = share_of_labels(source, 0.01, 0)
    assert sorted(source.labels[subset.indices]) == list(range(10))
    assert "0.01 of 80 images is less than one for each of 10 classes; each gives one: 10 images, 12.50%" in str(
        subset.notes
    )
    assert share_of_labels(source, 1, 0).indices.tolist() == list(range(80))


def test_a_list_is_read_back(demo_folder, tmp_path):
    """As --labels of the same images, and as images with labels of its own."""
    source = open_source(str(demo_folder / "train"))
    indices = balanced(source.labels, 0.3, 0)
    write_list(tmp_path / "labels.tsv", source, indices)
    assert listed(tmp_path / "labels.tsv", source, "--labels").indices.tolist() == indices.tolist()
    read = open_source(str(tmp_path / "labels.tsv"))
    assert [read.path(i).resolve() for i in range(len(read))] == [source.path(i).resolve() for i in indices]
    assert read.classes == source.classes
    assert read.labels.tolist() == source.labels[indices].tolist()


def test_epochs_hold_the_chosen_images_alone(demo_folder):
    """Each once, in another order each epoch, shared by two ranks; one that is excluded is replaced by a chosen one."""
    source = open_source(str(demo_folder / "train"))
    chosen = np.arange(3, 80, 7)
    skip = SkipList(len(source), 1.0, np.arange(len(source)) == 10)
    groups = (ViewGroup(1, ViewSpec(size=8, color="exact")),)

    def epoch(number, rank=0, ranks=1, skip=None):
        loader = open_training_loader(
            source, groups, batch_size=10, seed=0, backend="pil", workers=0, among=chosen, skip=skip, rank=rank,
            world_size=ranks,
        )  # fmt: skip
        return np.concatenate([batch.indices for batch in loader.epoch(number)]).tolist()

    first, second = epoch(0), epoch(1)
    assert len(set(first)) == len(set(second)) == 10
    assert set(first) | set(second) <= set(chosen.tolist())
    assert first != second
    assert epoch(0, 0, 2) + epoch(0, 1, 2) == first
    kept = epoch(0, skip=skip)
    assert [index for index, before in zip(kept, first, strict=True) if before != 10] == [i for i in first if i != 10]
    assert set(kept) <= set(chosen.tolist()) - {10}


@pytest.fixture
def wordnet(put, picture):
    """As ImageNet lies on a disk, and an image beside its folders."""
    root = put({}) / "train"
    for name in ("n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n01/same.JPEG", "n02/same.JPEG", "none.JPEG"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    return open_source(str(root))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("n02_1.JPEG\nn01_2.JPEG\n", ["n01/n01_2.JPEG", "n02/n02_1.JPEG"]),
        ("file_name,split\nn01/same.JPEG,a\nn02_1.JPEG,a\n", ["n01/same.JPEG", "n02/n02_1.JPEG"]),
        ("./n01/n01_1.JPEG\tany\n{root}/n02/same.JPEG\tword\n", ["n01/n01_1.JPEG", "n02/same.JPEG"]),
    ],
)
def test_names_may_be_bare_relative_or_absolute(wordnet, put, text, chosen):
    subset = listed(put({"list.txt": text.format(root=wordnet.root)}) / "list.txt", wordnet, "--labels")
    assert [wordnet.names[i].decode() for i in subset.indices] == chosen
    assert subset.notes == ()


def test_what_a_list_repeats_and_leaves_out_is_said(wordnet, put):
    subset = listed(put({"few.txt": "n01_1.JPEG\nn01_1.JPEG\n"}) / "few.txt", wordnet, "--labels")
    assert subset.indices.tolist() == [list(wordnet.names).index(b"n01/n01_1.JPEG")]
    assert subset.notes == ("1 lines of few.txt name an image again", "1 of 2 classes have no image in few.txt")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("n01_1.JPEG\nn03_1.JPEG\n", "file-missing"),
        ("n01_1.JPEG\nsame.JPEG\n", "ambiguous-name"),
        ("none.JPEG\n", "label-missing"),
        ("\n", "empty-list"),
    ],
)
def test_lists_that_do_not_fit_are_refused(wordnet, put, text, code):
    with refuses(code, "--labels"):
        listed(put({"list.txt": text}) / "list.txt", wordnet, "--labels")
