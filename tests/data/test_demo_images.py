"""The demo images: the same bytes for a seed, all or nothing on disk, a class that only the pattern tells."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsiam.data import demo_images
from fastsiam.data.demo_images import CLASSES, draw_demo, draw_image
from tests.support.refusals import refuses

NEIGHBOURS = 20


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def quickstart():
    """The 4000 train and 1000 val images of seed 0, before JPEG, with their labels."""

    def part(count, start):
        images = [draw_image(0, label, start + i) for label in range(len(CLASSES)) for i in range(count)]
        return np.stack(images), np.repeat(np.arange(len(CLASSES)), count)

    return *part(400, 0), *part(100, 1 << 31)


def knn_accuracy(similarity, train_labels, labels):
    """Percent of the rows of `similarity` [val, train] whose 20 nearest vote for the right class."""
    nearest = np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    votes = np.stack([(train_labels[nearest] == label).sum(axis=1) for label in range(len(CLASSES))], axis=1)
    return 100 * (votes.argmax(axis=1) == labels).mean()


def accuracy_of(feature, quickstart, metric):
    """Percent of val images whose class kNN finds from `feature`, centred; for euclidean over its std."""
    train, train_labels, val, labels = quickstart
    a, b = feature(train).astype(np.float32), feature(val).astype(np.float32)
    center, scale = a.mean(axis=0), a.std(axis=0) + 1e-9
    a, b = a - center, b - center
    if metric == "cosine":
        similarity = (b @ a.T) / np.linalg.norm(a, axis=1)
    else:
        a, b = a / scale, b / scale
        similarity = 2 * b @ a.T - (a**2).sum(axis=1)
    return knn_accuracy(similarity, train_labels, labels)


def mean_and_std(images):
    return np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)


def histogram(images):
    """16 bins a channel."""
    code = images // 16 + 16 * np.arange(3, dtype=np.uint8)
    return np.stack([np.bincount(image.ravel(), minlength=48) for image in code])


def joint_histogram(images):
    """4 x 4 x 4 bins of the colour."""
    code = (images // 64 * np.array([16, 4, 1], np.uint8)).sum(axis=3, dtype=np.uint8)
    return np.stack([np.bincount(image.ravel(), minlength=64) for image in code])


def thumbnail(images):
    return images.reshape(-1, 8, 6, 8, 6, 3).mean(axis=(2, 4)).reshape(len(images), -1)


def grey_thumbnail(images):
    return thumbnail(images).reshape(len(images), 64, 3).mean(axis=2)


def pixels(images):
    return images.reshape(len(images), -1)


def turned_spectrum(images):
    """What neither a turn nor a shift of the pattern changes: the log spectrum in polar coordinates
    (20 radii, 36 angles of a half turn), and of that the magnitudes of the Fourier series over the angle.
    """
    side = images.shape[1]
    grey = images.mean(axis=3, dtype=np.float32)
    window = np.outer(np.hanning(side), np.hanning(side))
    spectrum = np.log1p(np.abs(np.fft.fft2((grey - grey.mean(axis=(1, 2), keepdims=True)) * window)))
    radius, angle = np.arange(2, 22)[:, None], np.pi * np.arange(36) / 36
    rows, columns = np.rint(radius * np.sin(angle)).astype(int), np.rint(radius * np.cos(angle)).astype(int)
    return np.abs(np.fft.rfft(spectrum[:, rows, columns], axis=2))[:, :, :10].reshape(len(images), -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature", "metric"),
    [
        (mean_and_std, "euclidean"),
        (histogram, "euclidean"),
        (joint_histogram, "cosine"),
        (thumbnail, "cosine"),
        (thumbnail, "euclidean"),
        (grey_thumbnail, "cosine"),
        (pixels, "cosine"),
    ],
)
def test_neither_colour_nor_place_nor_pixels_tell_the_class(quickstart, feature, metric):
    assert accuracy_of(feature, quickstart, metric) < 35


@pytest.mark.slow
def test_the_pattern_tells_the_class(quickstart):
    """Without this, pure noise would pass for good images."""
    assert accuracy_of(turned_spectrum, quickstart, "euclidean") > 70


def test_every_image_is_grey_on_average_and_its_colour_has_no_mean(quickstart):
    means = quickstart[0].mean(axis=(1, 2))
    assert np.abs(means - 127.5).max() < 4
    assert np.abs((means - 127.5).mean(axis=0)).max() < 0.2
    contrast = quickstart[0].mean(axis=3).std(axis=(1, 2))
    by_class = contrast.reshape(len(CLASSES), -1).mean(axis=1)
    assert by_class.max() / by_class.min() < 1.03


def test_an_image_is_a_pure_function_of_its_arguments():
    first = draw_image(5, 2, 7)
    assert (first.shape, first.dtype) == ((48, 48, 3), np.uint8)
    draw_image(5, 3, 7)
    assert np.array_equal(draw_image(5, 2, 7), first)
    for other in (draw_image(6, 2, 7), draw_image(5, 3, 7), draw_image(5, 2, 8)):
        assert np.abs(other.astype(int) - first).mean() > 20


def test_arguments_out_of_range_are_refused():
    for arguments in ((-1, 0, 0), (1 << 64, 0, 0), (0, 10, 0), (0, 0, 1 << 32)):
        with refuses("out-of-range"):
            draw_image(*arguments)


def test_the_same_seed_gives_the_same_bytes_and_train_and_val_differ(tmp_path):
    for name, seed in (("a", 3), ("deep/b", 3), ("c", 4)):
        draw_demo(tmp_path / name, seed, train_per_class=3, val_per_class=2)
    a, b, c = (digest(tmp_path / name) for name in ("a", "deep/b", "c"))
    assert a == b
    assert list(a) == list(c)
    pictures = [name for name in a if name.endswith(".jpg")]
    assert not {a[name] for name in pictures} & {c[name] for name in pictures}
    assert len({a[name] for name in pictures}) == len(pictures) == 50
    assert sorted(path.name for path in (tmp_path / "a/train").iterdir()) == sorted(CLASSES)
    assert sorted(path.name for path in (tmp_path / "a/val/rings").iterdir()) == ["00000.jpg", "00001.jpg"]
    drawn, read = draw_image(3, CLASSES.index("rings"), 1), Image.open(tmp_path / "a/train/rings/00001.jpg")
    assert (read.size, read.mode) == ((48, 48), "RGB")
    assert np.abs(np.asarray(read).astype(int) - drawn).mean() < 12


def test_more_images_leave_the_first_ones_as_they_are(tmp_path):
    draw_demo(tmp_path / "few", 3, train_per_class=1, val_per_class=1)
    draw_demo(tmp_path / "more", 3, train_per_class=2, val_per_class=2)
    few, more = digest(tmp_path / "few"), digest(tmp_path / "more")
    assert all(more[name] == few[name] for name in few if name.endswith(".jpg"))


@pytest.fixture
def at_image(monkeypatch):
    """Sets what happens before the image of a number, from 1 on, is drawn; returns the numbers drawn."""

    def set_action(number, action):
        drawn, real = [], draw_image

        def draw(*arguments):
            drawn.append(len(drawn) + 1)
            if len(drawn) == number:
                action()
            return real(*arguments)

        monkeypatch.setattr(demo_images, "draw_image", draw)
        return drawn

    return set_action


def test_a_whole_set_is_not_drawn_again(tmp_path, at_image):
    drawn = at_image(0, None)
    for _ in range(2):
        draw_demo(tmp_path / "demo", 0, 2, 1)
    assert len(drawn) == 30
    note = json.loads((tmp_path / "demo/demo.json").read_text())
    assert note == {"version": demo_images.VERSION, "seed": 0, "train_per_class": 2, "val_per_class": 1}


def test_a_drawing_that_is_stopped_leaves_nothing(tmp_path, at_image):
    def stop():
        assert not (tmp_path / "demo").exists()
        raise KeyboardInterrupt

    at_image(12, stop)
    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "demo", 0, 2, 1)
    assert list(tmp_path.iterdir()) == []


def test_two_drawings_at_once_leave_one_whole_set(tmp_path, at_image):
    root = tmp_path / "demo"
    at_image(2, lambda: draw_demo(root, 0, 1, 1))
    draw_demo(root, 0, 1, 1)
    assert len(digest(root)) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("note", [None, "{", "[]", '{"seed": 0}', "another seed"])
def test_a_folder_with_anything_else_is_refused(tmp_path, note):
    root = tmp_path / "demo"
    if note == "another seed":
        draw_demo(root, 1, 1, 1)
    else:
        root.mkdir()
        if note is not None:
            (root / "demo.json").write_text(note)
    before = digest(root)
    with refuses("other-demo"):
        draw_demo(root, 0, 1, 1)
    assert digest(root) == before


def test_a_count_below_zero_is_refused_before_anything_is_written(tmp_path):
    with refuses("out-of-range"):
        draw_demo(tmp_path / "demo", 0, -1, 1)
    assert list(tmp_path.iterdir()) == []
