"""Features on the disk are the encoder's own, in the source's order; a stopped command goes on."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import fastsiam
from fastsiam.__main__ import main
from fastsiam.embed import features
from fastsiam.embed.table import read_table, write_table
from fastsiam.methods import build_method
from fastsiam.run.encoder_file import describe_encoder, save_encoder
from tests.support.files import largest_file
from tests.support.processes import run_python
from tests.support.refusals import refused


@pytest.fixture
def encoder_path(tiny_config, tmp_path):
    """An encoder whose running statistics have seen data, in a file."""
    config = tiny_config()
    method = build_method(config)
    method([torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))])
    path = tmp_path / "encoder.safetensors"
    save_encoder(method.encoder, describe_encoder(config, 7, None), path)
    return path


def embed(*arguments):
    return main(["embed", *map(str, arguments), "--backend", "pil", "--workers", "0", "--precision", "fp32"])


def as_torchvision(folder, encoder_path):
    """Features of the sorted images of a folder, prepared by torchvision."""
    encoder = fastsiam.load_encoder(encoder_path)
    prepare = v2.Compose([v2.ToImage(), v2.Resize((16, 16)), v2.ToDtype(torch.float32, scale=True)])
    paths = sorted(folder.rglob("*.jpg"))
    images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        return paths, encoder(v2.functional.normalize(images, encoder.mean, encoder.std))


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
def test_features_are_those_of_torchvisions_preprocessing_in_the_order_of_the_source(
    suffix, encoder_path, demo_folder, tmp_path, capsys
):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    source, out = demo_folder / "val", tmp_path / f"features{suffix}"
    assert embed(encoder_path, source, "--out", out, "--batch-size", 16) == 0
    table = read_table(out)
    paths, expected = as_torchvision(source, encoder_path)
    assert table.names.tolist() == [str(path.relative_to(source)) for path in paths]
    assert [table.classes[label] for label in table.labels] == [path.parent.name for path in paths]
    # Pixels are rounded to 8 bits after resizing; another image is 0.3 away at least.
    assert F.cosine_similarity(torch.from_numpy(np.array(table.features)), expected).min() > 0.9995
    assert table.features.dtype == np.float32
    assert table.description["mean"] == [0.5, 0.5, 0.5]
    assert f"features of {len(paths)} images" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["encoder.safetensors", out.name])


def test_half_precision_is_the_rounded_single(encoder_path, demo_folder, tmp_path):
    for dtype in ("fp32", "fp16"):
        assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / f"{dtype}.npz", "--dtype", dtype) == 0
    single, half = (read_table(tmp_path / f"{dtype}.npz").features for dtype in ("fp32", "fp16"))
    assert half.dtype == np.float16
    assert (half == single.astype(np.float16)).all()


def test_a_layer_is_averaged_over_space(encoder_path, demo_folder, tmp_path):
    assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / "f.npz") == 0
    assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / "l.npz", "--layer", "blocks") == 0
    # The encoder ends with this very mean.
    assert np.allclose(read_table(tmp_path / "f.npz").features, read_table(tmp_path / "l.npz").features, atol=1e-6)
    error = refused("embed", encoder_path, demo_folder / "val", "--out", tmp_path / "x.npz", "--layer", "layer9")
    assert (error.code, error.key) == ("no-layer", "--layer")


def test_a_stopped_command_goes_on_where_it_was(encoder_path, demo_folder, tmp_path, monkeypatch):
    source = demo_folder / "val"
    assert embed(encoder_path, source, "--out", tmp_path / "whole.npz", "--batch-size", 8) == 0
    batches, add = [], features.Partial.add

    def stopping(self, found, indices):
        add(self, found, indices)
        batches.append(len(indices))
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(features.Partial, "add", stopping)
    out = tmp_path / "again.npz"
    assert embed(encoder_path, source, "--out", out, "--batch-size", 8) == 130
    assert not out.exists()
    partial = tmp_path / "again.npz.partial"
    # A kill in mid-write leaves part of a row.
    with open(partial / "features", "ab") as file:
        file.write(b"part")
    assert embed(encoder_path, source, "--out", out, "--batch-size", 8) == 0
    assert sum(batches) == 40
    whole, again = read_table(tmp_path / "whole.npz"), read_table(out)
    assert (again.features == whole.features).all()
    assert (again.names == whole.names).all()
    assert not partial.exists()


def test_what_is_there_is_not_computed_again_and_other_features_are_not_replaced(
    encoder_path, demo_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "f.npz"
    assert embed(encoder_path, demo_folder / "val", "--out", out) == 0
    before = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(features, "_fill")
        assert embed(encoder_path, demo_folder / "val", "--out", out) == 0
    assert "held already" in capsys.readouterr().out
    assert refused("embed", encoder_path, demo_folder / "train", "--out", out).code == "other-features"
    (tmp_path / "other.npz").write_text("words")
    error = refused("embed", encoder_path, demo_folder / "val", "--out", tmp_path / "other.npz")
    assert error.code == "not-features"
    assert out.read_bytes() == before


def test_images_that_cannot_be_decoded_have_no_row(encoder_path, demo_folder, tmp_path, capsys):
    source = tmp_path / "images"
    shutil.copytree(demo_folder / "val", source)
    damaged = sorted(source.rglob("*.jpg"))[3]
    damaged.write_bytes(damaged.read_bytes()[:20])
    # One of 40 images is more than one in 1,000.
    assert embed(encoder_path, source, "--out", tmp_path / "f.npz") == 2
    said = capsys.readouterr().err
    assert "1 of 40 images cannot be used, more than --max-bad-fraction=0.001 allows" in said
    assert not (tmp_path / "f.npz").exists()
    assert embed(encoder_path, source, "--out", tmp_path / "f.npz", "--max-bad-fraction", 0.1) == 0
    assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / "all.npz") == 0
    left, whole = read_table(tmp_path / "f.npz"), read_table(tmp_path / "all.npz")
    assert (left.features == np.delete(whole.features, 3, 0)).all()
    assert left.names.tolist() == np.delete(whole.names, 3).tolist()
    assert refused("embed", encoder_path, tmp_path / "none", "--out", tmp_path / "x.npz").code == "absent"


def test_the_page_shows_an_image_as_its_own_neighbour(encoder_path, demo_folder, tmp_path):
    paths = sorted((demo_folder / "val").rglob("*.jpg"))
    query = tmp_path / "a query.jpg"
    shutil.copy(paths[5], query)
    page = tmp_path / "page.html"
    options = ("--neighbours", query, paths[9], "--html", page, "--count", 3)
    assert embed(encoder_path, demo_folder / "val", *options) == 0
    html = page.read_text()
    names = re.findall(r"<figcaption><b>(\d\.\d+)</b> <bdi>(\w+)</bdi><br><bdi>(.+?)</bdi>", html)
    assert len(names) == 6
    for first, path in ((names[0], paths[5]), (names[3], paths[9])):
        assert first == ("1.000", path.parent.name, str(path.relative_to(demo_folder / "val")))
    similar = [float(value) for value, *_ in names]
    assert similar[:3] == sorted(similar[:3], reverse=True)
    assert html.count("data:image/png;base64,") == 8
    assert "<script" not in html


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--out", "f.csv"], "unknown-format"),
        ([], "no-out"),
        (["--html", "page.html"], "half-a-page"),
        (["--neighbours", "nowhere.jpg", "--html", "page.html"], "no-such-file"),
        (["--out", "nowhere/f.npz"], "no-folder"),
        (["--out", "f.npz", "--size", "0"], "out-of-range"),
    ],
)
def test_mistakes_are_one_sentence(arguments, code, encoder_path, demo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("embed", encoder_path, demo_folder / "val", *arguments).code == code
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_a_mistake_does_not_wait_for_torch():
    """Threads of torch are those of its import, before which the command chooses them."""
    script = "import sys; from fastsiam.embed.__main__ import main; main(['encoder', 'images']); "
    assert run_python("-c", f"{script}sys.exit('torch' in sys.modules)").returncode == 0


def test_errors_name_options(encoder_path, demo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused("embed", encoder_path, demo_folder / "val", "--out", tmp_path / "f.npz", "--device", "cuda")
    assert (error.code, error.key) == ("no-cuda-device", "--device")
    assert "train." not in str(error)


def test_a_full_disk_is_one_sentence_while_features_come(encoder_path, demo_folder, tmp_path):
    # Numba writes what it compiles to files as well.
    assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / "before.npz") == 0
    with largest_file(1000):
        error = refused("embed", encoder_path, demo_folder / "val", "--out", tmp_path / "f.npz")
    assert (error.code, error.key) == ("disk", "--out")
    assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / "f.npz") == 0
    assert len(read_table(tmp_path / "f.npz").features) == 40


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
def test_a_full_disk_is_one_sentence_at_the_end(suffix, encoder_path, demo_folder, tmp_path, monkeypatch):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")

    def write_on_a_full_disk(*arguments):
        with largest_file(1000):
            write_table(*arguments)

    monkeypatch.setattr("fastsiam.embed.table.write_table", write_on_a_full_disk)
    error = refused("embed", encoder_path, demo_folder / "val", "--out", tmp_path / f"f{suffix}")
    assert (error.code, error.key) == ("out-unwritable", "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.safetensors", f"f{suffix}.partial"]


def test_weights_that_are_not_finite_write_nothing(tiny_config, demo_folder, tmp_path):
    config = tiny_config()
    encoder = build_method(config).encoder
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    save_encoder(encoder, describe_encoder(config, 7, None), tmp_path / "encoder.safetensors")
    error = refused("embed", tmp_path, demo_folder / "val", "--out", tmp_path / "f.npz")
    assert error.code == "weights-not-finite"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_the_description_says_how_the_encoder_was_fed(encoder_path, demo_folder, tmp_path):
    assert embed(encoder_path, demo_folder / "val", "--out", tmp_path / "f.npz", "--size", 24) == 0
    with np.load(tmp_path / "f.npz") as archive:
        said = json.loads(str(archive["description"]))
    assert (said["size"], said["crop_ratio"], said["computed_in"], said["step"]) == (24, 1.0, "fp32", 7)
