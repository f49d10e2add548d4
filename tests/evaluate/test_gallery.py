"""pictures.npz holds views and neighbours of a run, and neither writing nor losing it changes the run."""

import numpy as np
import pytest
import torch

import fastsiam
from fastsiam.config import load_config
from fastsiam.config.views import RECIPES
from fastsiam.data.sources.open import open_source
from fastsiam.evaluate import gallery as pictures_module
from fastsiam.evaluate.gallery import Pictures, project, to_uint8
from fastsiam.evaluate.online import OnlineEvaluation
from fastsiam.kernels.reference import normalize, to_unit
from fastsiam.run.checkpoint import Checkpoints
from fastsiam.runtime.files import read_arrays, write_arrays
from fastsiam.runtime.runtime import Runtime
from fastsiam.train import main
from tests.support.files import largest_file
from tests.support.runs import assert_same_run, lines, train_here

SPEC = RECIPES["demo"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_is_taken_back(dtype):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    views = normalize(to_unit(pixels), SPEC.mean, SPEC.std, dtype)
    back = to_uint8(views, SPEC, 160)
    assert np.abs(back.astype(int) - pixels.numpy().astype(int)).max() <= (0 if dtype == torch.float32 else 1)
    half = to_uint8(views, SPEC, 8)
    assert half.shape == (1, 8, 8, 3)
    assert abs(half.mean() - pixels.float().mean()) < 1


def test_a_projection_has_the_variances_of_an_svd():
    features = np.random.default_rng(0).normal(size=(40, 12)) * np.arange(1, 13)
    points, explained = project(features)
    centred = features - features.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(points) == pytest.approx(np.abs(centred @ axes[:2].T), abs=1e-9)
    assert explained == pytest.approx(values[:2] ** 2 / (values**2).sum())
    assert all(column[np.abs(column).argmax()] > 0 for column in points.T)
    assert all((part == 0).all() for part in project(np.ones((5, 3))))
    assert project(np.array([[1.0, 0], [3.0, 0]]))[1].tolist() == [1, 0]
    assert project(np.ones((1, 4)))[0].tolist() == [[0, 0]]


@pytest.fixture
def first_step(monkeypatch):
    """The views and indices of the first step of each run."""
    seen = []
    real = Pictures.remember

    def spy(self, step, views, indices):
        if step == 1:
            seen.append((views[0].clone(), indices.copy()))
        real(self, step, views, indices)

    monkeypatch.setattr(Pictures, "remember", spy)
    return seen


def test_a_run_keeps_its_first_pairs_and_its_last_neighbours(tiny, tmp_path, demo_folder, first_step):
    fastsiam.pretrain(load_config("quickstart", tiny()))
    found = read_arrays(tmp_path / "runs/run/pictures.npz")
    views, indices = first_step[0]
    source, val = open_source(f"{demo_folder}/train"), open_source(f"{demo_folder}/val", "data.val")
    pixels = ((views * 0.25 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (found["pair_images"] == pixels.reshape(2, 8, 16, 16, 3)).all()
    assert found["pair_names"].tolist() == [source.names[index].decode() for index in indices]
    assert found["pair_labels"].tolist() == [source.classes[source.labels[index]] for index in indices]
    assert found["knn_step"] == 20
    assert found["points"].shape == (40, 2)
    assert found["point_labels"].tolist() == [val.classes[label] for label in val.labels]
    assert len(set(found["query_labels"].tolist())) == 8
    assert found["neighbour_images"].shape == (8, 5, 16, 16, 3)
    assert (np.diff(found["neighbour_similarity"], axis=1) <= 0).all()
    assert (tmp_path / "runs/run/pictures.npz").stat().st_size < 200_000
    by_name = {source.names[index].decode(): index for index in range(len(source))}
    assert all(name.startswith(f"{label}/") for name, label in zip(
        found["neighbour_names"].ravel(), found["neighbour_labels"].ravel(), strict=True
    ))  # fmt: skip
    assert {*found["neighbour_names"].ravel().tolist()} <= {*by_name}


def test_of_more_views_than_two_the_first_two_of_an_image_are_a_pair(tmp_path, demo_folder):
    source = open_source(f"{demo_folder}/train")
    pictures = Pictures(tmp_path, source, None, SPEC, pytest.fail, writes=True)
    shades = torch.arange(3 * 10) * 8 / 255
    pictures.remember(1, [(shades.view(-1, 1, 1, 1).expand(-1, 3, 4, 4) - 0.5) / 0.25], np.arange(10))
    pictures.write_pairs()
    found = read_arrays(tmp_path / "pictures.npz")["pair_images"][:, :, 0, 0, 0]
    assert found.tolist() == [[8 * row for row in range(start, start + 8)] for start in (0, 10)]


def test_the_pairs_are_there_before_a_checkpoint_is(tiny, tmp_path, monkeypatch):
    """A run that goes on from one does not come to its first step again, and its first log line may be far."""

    class Killed(Exception):
        pass

    def killed(self, contents):
        self.save(contents)
        raise Killed

    monkeypatch.setattr(Checkpoints, "save_on_the_way", killed)
    with pytest.raises(Killed):
        fastsiam.pretrain(
            load_config("quickstart", tiny("train.log_every_steps=1000", "checkpoint.every_seconds=1e-6"))
        )
    assert (tmp_path / "runs/run/checkpoint.pt").exists()
    assert read_arrays(tmp_path / "runs/run/pictures.npz")["pair_images"].shape == (2, 8, 16, 16, 3)


def test_thumbnails_belong_to_their_names(tiny, tmp_path):
    """Raw pixels as features: a training image that is a validation image is its own nearest neighbour."""
    config = load_config("quickstart", tiny())
    train = open_source(config.data.train)
    online = OnlineEvaluation(config, train, train, (None, None), Runtime.of(config.train))
    pictures = Pictures(tmp_path, train, train, SPEC, pytest.fail, writes=True)
    before = torch.get_rng_state()
    online._knn(lambda views: views.flatten(1), pictures, 7)
    assert torch.equal(torch.get_rng_state(), before)
    found = read_arrays(tmp_path / "pictures.npz")
    assert (found["neighbour_names"][:, 0] == found["query_names"]).all()
    assert (found["neighbour_images"][:, 0] == found["query_images"]).all()
    assert found["neighbour_similarity"][:, 0] == pytest.approx(np.ones(8), abs=1e-5)


@pytest.mark.slow
def test_pictures_change_nothing_of_a_run_and_outlive_a_resume(tiny, tmp_path, monkeypatch):
    def run_twice(name):
        for stop in ("train.max_steps=13", "train.max_steps=null"):
            assert main(["--config", "quickstart", *tiny(f"run.name={name}", stop)]) == 0
            found.append(read_arrays(tmp_path / f"runs/{name}/pictures.npz"))

    found = []
    run_twice("with")
    first, last = found
    assert (last["pair_images"] == first["pair_images"]).all()
    assert (first["knn_step"], last["knn_step"]) == (13, 20)
    monkeypatch.setattr(Pictures, "evaluated", lambda *_: None)
    monkeypatch.setattr(Pictures, "remember", lambda *_: None)
    run_twice("without")
    assert found[2:] == [{}, {}]
    assert_same_run(tmp_path / "runs/with", tmp_path / "runs/without")


@pytest.mark.slow
def test_several_ranks_keep_the_pictures_of_one(tiny, tmp_path, ranks):
    # Later steps take rounding apart.
    whole, parts = (tiny(f"run.name={name}", "train.max_steps=1") for name in ("one", "two"))
    train_here(whole)
    ranks(2, train_here, parts)
    one, two = (read_arrays(tmp_path / f"runs/{name}/pictures.npz") for name in ("one", "two"))
    assert two["pair_names"].tolist() == one["pair_names"][:4].tolist()
    assert (two["pair_images"] == one["pair_images"][:, :4]).all()
    assert two["query_names"].tolist() == one["query_names"].tolist()
    assert two["point_labels"].tolist() == one["point_labels"].tolist()
    assert two["points"] == pytest.approx(one["points"], abs=1e-3)
    assert two["neighbour_similarity"] == pytest.approx(one["neighbour_similarity"], abs=1e-4)


def test_a_full_disk_warns_once_and_the_run_goes_on(tmp_path, demo_folder):
    source, said = open_source(f"{demo_folder}/train"), []
    pictures = Pictures(tmp_path, source, source, SPEC, said.append, writes=True)
    for _ in range(2):
        pictures.remember(1, [torch.zeros(16, 3, 16, 16)], np.arange(8))
        with largest_file(500):
            pictures.write_pairs()
    assert [notice.code for notice in said] == ["pictures-unwritten"]
    assert list(tmp_path.iterdir()) == []
    pictures.remember(1, [torch.zeros(16, 3, 16, 16)], np.arange(8))
    pictures.write_pairs()
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.npz"]


def test_a_damaged_file_is_as_none_and_pickles_are_not_read(tmp_path):
    path = tmp_path / "pictures.npz"
    assert read_arrays(path) == {}
    write_arrays(path, {"a": np.arange(3)})
    whole = path.read_bytes()
    for data in (b"", b"PK", whole[: len(whole) // 2], whole.replace(b"\x01\x00\x00\x00\x00\x00", b"\x07" * 6)):
        path.write_bytes(data)
        assert read_arrays(path) == {}
    np.savez(path, a=np.array([{"an": "object"}], dtype=object))
    assert read_arrays(path) == {}


def test_unlabelled_images_have_pairs_and_the_synthetic_backend_has_none(tiny, tmp_path, demo_folder):
    flat = f"data.train={demo_folder}/train/rings"
    assert main(["--config", "quickstart", *tiny(flat, "data.val=null", "train.max_steps=1")]) == 0
    found = read_arrays(tmp_path / "runs/run/pictures.npz")
    assert found.keys() == {"pair_images", "pair_names", "pair_labels"}
    assert {*found["pair_labels"].tolist()} == {""}
    synthetic = ("data.backend=synthetic", "train.max_steps=1", "run.name=synthetic", "data.val=null")
    assert main(["--config", "quickstart", *tiny(*synthetic)]) == 0
    assert not (tmp_path / "runs/synthetic/pictures.npz").exists()
    assert [line for line in lines(tmp_path / "runs/synthetic") if line["kind"] == "warning"] == []


def test_queries_are_spread_over_classes(tmp_path, demo_folder):
    source = open_source(f"{demo_folder}/train")
    pictures = Pictures(tmp_path, source, source, SPEC, pytest.fail, writes=True)
    many = np.repeat(np.arange(100), 70)
    object.__setattr__(source, "labels", many)
    chosen = pictures.chosen()
    assert np.unique(many[chosen], return_counts=True)[0].tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert set(np.unique(many[chosen], return_counts=True)[1]) == {50}
    assert pictures_module._one_of_each(np.array([3, 3, 1, 1, 2])).tolist() == [2, 4, 0, 3, 1]
