"""The commands knn and spectrum: numbers of their JSON line, and the files they leave."""

import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.__main__ import main
from fastsiam.data.sources.open import open_source
from fastsiam.evaluate import spectrum
from fastsiam.evaluate.knn import knn_accuracies
from fastsiam.kernels.reference import normalize, to_unit
from fastsiam.report.read_run import open_run
from fastsiam.report.summary import evaluations
from fastsiam.run.encoder_file import load_encoder
from tests.support.encoders import random_encoder
from tests.support.processes import REPOSITORY
from tests.support.refusals import refused
from tests.support.run_folders import write_run

PHOTOGRAPHS = REPOSITORY.parent / "shared/data/tiny-imagenet-50k.tar.xz"
BACKEND = ("--backend", "pil", "--workers", "0", "--precision", "fp32", "--device", "cpu")


@pytest.fixture
def encoder(tmp_path):
    """In a run folder."""
    return random_encoder(write_run(tmp_path / "run") / "encoder.safetensors").parent


def evaluated(capsys, *arguments):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), *BACKEND]) == 0
    return json.loads(capsys.readouterr().out)


def pixels_of(folder, ratio):
    """Images of a folder as the encoder takes them, without a loader of ours; the demo images have 48 px."""
    source, rows = open_source(str(folder)), []
    for name in source.names:
        image = Image.open(source.root / name.decode()).convert("RGB")
        low, high = 24 - 24 * ratio, 24 + 24 * ratio
        rows.append(np.array(image.resize((16, 16), Image.Resampling.BILINEAR, (low, low, high, high))))
    return torch.from_numpy(np.stack(rows)), torch.tensor(source.labels)


def features_of(network, folder):
    pixels, labels = pixels_of(folder, network.description["crop_ratio"])
    with torch.no_grad():
        return network(normalize(to_unit(pixels), network.mean, network.std, torch.float32)), labels


@pytest.fixture
def labelled(demo_folder, tmp_path):
    """Folders of images for training and for validation: photographs of three classes where the archive lies beside."""
    if not PHOTOGRAPHS.is_file():
        return demo_folder / "train", demo_folder / "val"
    with tarfile.open(PHOTOGRAPHS) as archive:
        for member, number in zip(archive, range(750), strict=False):
            if member.isfile() and number % 4 == 0:
                split = "val" if number % 16 == 0 else "train"
                path = tmp_path / split / member.name.partition("/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    return tmp_path / "train", tmp_path / "val"


@pytest.mark.needs("sklearn")
def test_knn_of_photographs_is_that_of_scikit_learn(encoder, labelled, capsys, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    train, val = labelled
    line = evaluated(capsys, "knn", encoder, "--train", train, "--val", val, "--k", "20", "--temperature", "0.07")
    tables = []
    for folder in labelled:
        out = tmp_path / f"{folder.name}.npz"
        assert main(["embed", str(encoder), str(folder), "--out", str(out), *BACKEND]) == 0
        with np.load(out) as archive:
            features = archive["features"] / np.linalg.norm(archive["features"], axis=1, keepdims=True)
            # The search keeps unit features in half precision.
            tables.append((features.astype(np.float16).astype(np.float64), archive["labels"]))
    (bank, labels), (queries, truth) = tables
    options = {"metric": "cosine", "weights": lambda distance: math.e ** (-distance / 0.07)}
    score = KNeighborsClassifier(20, **options).fit(bank, labels).score(queries, truth)
    assert len(queries) >= 40
    assert line["top1_k20_T0.07"] == pytest.approx(100 * score)


def test_knn_is_that_of_features_computed_by_hand(encoder, demo_folder, capsys, tmp_path):
    line = evaluated(
        capsys, "knn", encoder, "--train", demo_folder / "train", "--val", demo_folder / "val",
        "--k", "3,500", "--temperature", "0.07,0.2",
    )  # fmt: skip
    network = load_encoder(encoder)
    found = [*features_of(network, demo_folder / "train"), *features_of(network, demo_folder / "val")]
    votes = [(k, t) for k in (3, 80) for t in (0.07, 0.2)]
    expected = knn_accuracies(*found, votes=votes)
    # A rounding of the crops may turn one of 40 images.
    for (k, t), accuracy in expected.items():
        assert line[f"top1_k{k}_T{t:g}"] == pytest.approx(accuracy.top1, abs=2.6)
        assert line[f"top5_k{k}_T{t:g}"] == pytest.approx(accuracy.top5, abs=2.6)
    assert (line["protocol"], line["epoch"], line["features"], line["k"]) == ("knn", "last", "offline", [3, 80])
    assert (line["data"]["train_images"], line["data"]["val_images"], line["data"]["classes"]) == (80, 40, 10)
    folder = encoder / "evaluate"
    assert json.loads((folder / "evaluations.jsonl").read_text()) == line
    confusion = np.load(folder / "knn_confusion.npy")
    assert confusion.sum(1).tolist() == [4] * 10
    assert 100 * confusion.trace() / 40 == pytest.approx(line["top1_k3_T0.07"])
    for name in ("neighbours", "confusion", "projection"):
        with Image.open(folder / f"knn_{name}.png") as picture:
            assert min(picture.size) > 300
    online, offline = evaluations(open_run(encoder, "run"))
    assert (online.features, offline.features, offline.epoch, offline.step) == ("online", "offline", "last", "7")
    assert f"top1_k3_T0.07 {line['top1_k3_T0.07']:.2f}" in offline.numbers


def test_a_lone_file_leaves_nothing_behind(encoder, demo_folder, capsys, tmp_path):
    (tmp_path / "lone").mkdir()
    lone = random_encoder(tmp_path / "lone/encoder.safetensors")
    images = ("--train", demo_folder / "train", "--val", demo_folder / "val", "--k", "5")
    trained = evaluated(capsys, "knn", lone, *images)
    assert [path.name for path in lone.parent.iterdir()] == ["encoder.safetensors"]
    # The control fills its statistics from images; the file's are those of no image.
    control = evaluated(capsys, "knn", lone, *images, "--untrained")
    assert control["encoder"]["untrained"]
    assert {key: control[key] for key in trained["results"]} != {key: trained[key] for key in trained["results"]}


def test_labelled_images_that_cannot_be_decoded_are_one_sentence(encoder, demo_folder, tmp_path):
    """Beside one without a label, which can."""
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / "damaged" / name).parent.mkdir(parents=True)
        (tmp_path / "damaged" / name).write_bytes(b"\xff\xd8\xff")
    shutil.copy(next((demo_folder / "val/rings").iterdir()), tmp_path / "damaged/good.jpg")
    images = ("--train", tmp_path / "damaged", "--val", tmp_path / "damaged", "--max-bad-fraction", 1)
    error = refused("evaluate", "knn", encoder, *images, *BACKEND)
    assert (error.code, error.key) == ("no-decodable-images", "--train")


def test_the_spectrum_is_that_of_drawn_images_and_needs_no_labels(encoder, demo_folder, capsys):
    flat = demo_folder / "train/rings"
    line = evaluated(capsys, "spectrum", encoder, "--train", flat, "--val", demo_folder / "val", "--images", 20)
    expected = spectrum.measure(features_of(load_encoder(encoder), flat)[0])
    for name in ("rankme", "effective_rank", "uniformity"):
        assert line[name] == pytest.approx(getattr(expected, name), rel=0.02)
    assert (line["data"]["train_images"], line["data"]["val_images"], line["views"]) == (8, 20, "demo")
    assert 0 < line["alignment"] < 4
    assert line["val_rankme"] > line["rankme"]
