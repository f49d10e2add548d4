"""`fastsiam evaluate`: what it lists, and that each mistake is one sentence, with nothing written."""

import pytest
from PIL import Image

from fastsiam.evaluate.__main__ import PROTOCOLS, main
from tests.support.encoders import random_encoder
from tests.support.refusals import refused


@pytest.fixture
def encoder(tmp_path):
    return random_encoder(tmp_path / "encoder.safetensors")


def test_it_lists_its_protocols(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().err
    assert all(f"\n  {name}" in printed for name in PROTOCOLS)
    with pytest.raises(SystemExit) as ended:
        main(["kn"])
    assert ended.value.code == 2


def test_options_are_those_of_the_protocol(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["knn", "--help"])
    assert ended.value.code == 0
    assert "--temperature" in capsys.readouterr().out


MISTAKES = {
    "no encoder there": (("NOWHERE",), "no-such-file", None),
    "no encoder in it": (("{tmp}/picture.png",), "not-an-encoder", None),
    "no images there": (("ENCODER", "--val", "NOWHERE"), "absent", "--val"),
    "no labels for training": (("ENCODER", "--train", "{demo}/train/rings"), "no-labels", "--train"),
    "no labels for validation": (("ENCODER", "--val", "{demo}/val/rings"), "no-labels", "--val"),
    "no images in it": (("ENCODER", "--val", "{tmp}/empty"), "no-images", "--val"),
    "other classes": (("ENCODER", "--val", "{tmp}/other"), "unknown-classes", "--val"),
    "no neighbours": (("ENCODER", "--k", "20,0"), "out-of-range", "--k"),
    "no temperature": (("ENCODER", "--temperature", "0"), "out-of-range", "--temperature"),
    "no size": (("ENCODER", "--size", "0"), "out-of-range", "--size"),
    "no crop": (("ENCODER", "--crop-ratio", "1.5"), "out-of-range", "--crop-ratio"),
    "results into a file": (("ENCODER", "--out", "{tmp}/picture.png"), "out-unwritable", "--out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_written(name, encoder, demo_folder, tmp_path):
    arguments, code, key = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name in ("cat", "dog"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / name / "1.png")
    before = sorted(tmp_path.rglob("*"))
    given = [text.format(tmp=tmp_path, demo=demo_folder).replace("ENCODER", str(encoder)) for text in arguments]
    images = ["--train", f"{demo_folder}/train", "--val", f"{demo_folder}/val", "--out", f"{tmp_path}/out"]
    error = refused("evaluate", "knn", *images, *given)
    assert (error.code, error.key) == (code, key)
    assert sorted(tmp_path.rglob("*")) == before
