"""Lines of the features' spectrum in a run: with each kNN, and in its place without labels."""

import pytest

import fastsiam
from fastsiam.config import load_config
from fastsiam.data.sources.open import open_source
from fastsiam.evaluate import online, spectrum
from fastsiam.run.encoder_file import load_encoder
from fastsiam.runtime.runtime import Runtime
from tests.support.runs import lines


def measured(folder):
    return {line["step"]: line for line in lines(folder) if line["kind"] == "spectrum"}


def test_it_comes_with_each_knn_and_without_labels_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(online, "SPECTRUM_IMAGES", 50)
    for name, val in (("labelled", ()), ("unlabelled", ("data.val=null",))):
        fastsiam.pretrain(load_config("quickstart", tiny(f"run.name={name}", *val)))
    with_knn, without = measured(tmp_path / "runs/labelled"), measured(tmp_path / "runs/unlabelled")
    assert list(with_knn) == [line["step"] for line in lines(tmp_path / "runs/labelled") if line["kind"] == "knn"]
    assert list(without) == [10, 20]
    for step in (10, 20):
        for name in ("rankme", "effective_rank", "alpha", "uniformity", "images"):
            assert without[step][name] == pytest.approx(with_knn[step][name], rel=1e-9)
    assert with_knn[20]["images"] == 50
    assert with_knn[10]["rankme"] != with_knn[20]["rankme"]


def test_it_is_that_of_the_features_of_the_encoder(tiny, tmp_path):
    config = load_config("quickstart", tiny("data.val=null", "train.max_steps=3"))
    fastsiam.pretrain(config)
    encoder = load_encoder(tmp_path / "runs/run")
    source = open_source(config.data.train)
    again = online.OnlineEvaluation(config, source, None, (None, None), Runtime.of(config.train))
    features, _, _ = again._extract(encoder, again._train)
    expected = spectrum.measure(features)
    (line,) = measured(tmp_path / "runs/run").values()
    assert (line["images"], line["rankme"]) == (80, pytest.approx(expected.rankme, rel=1e-6))
