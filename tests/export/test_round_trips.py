"""Each export goes back into the library that it is for, by the line of code that the command prints."""

import json
import pickle
import pickletools

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open

import fastsiam
from fastsiam.config.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from fastsiam.data.build import open_evaluation_loader
from fastsiam.data.sources.open import open_source
from fastsiam.export.detectron2 import config_keys
from fastsiam.models.encoder import build_encoder
from tests.support.exports import described, exported, features, images, write_encoder


@pytest.mark.parametrize("out", ["resnet.pth", "resnet.safetensors"])
def test_torchvision_lacks_the_classifier_alone(tmp_path, capsys, out):
    encoder, code = exported(tmp_path, capsys, "resnet18", "torchvision", out)
    model = code["model"]
    assert torch.equal(features(model), features(encoder))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"fc.weight\", \"fc.bias\"\. *$"):
        torchvision.models.resnet18().load_state_dict(model.state_dict(), strict=True)
    assert described(tmp_path / out) == encoder.description


def test_torchvisions_other_networks_lack_the_classifier_alone_too(tmp_path, capsys):
    encoder, code = exported(tmp_path, capsys, "mobilenet_v3_small", "torchvision", "mobilenet.pth")
    model = code["model"]
    model.classifier = torch.nn.Identity()
    assert torch.equal(features(model), features(encoder))
    saved = torch.load(tmp_path / "mobilenet.pth", weights_only=True)
    missing, unexpected = torchvision.models.mobilenet_v3_small().load_state_dict(saved, strict=False)
    assert (sorted({name.partition(".")[0] for name in missing}), unexpected) == (["classifier"], [])


def assert_feeds_as_ours(config):
    """timm's resolved data configuration."""
    assert (tuple(config["mean"]), tuple(config["std"])) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (tuple(config["input_size"]), config["interpolation"]) == ((3, 224, 224), "bilinear")
    assert (config["crop_pct"], config["crop_mode"]) == (0.875, "center")


@pytest.mark.needs("timm")
@pytest.mark.parametrize("out", ["resnet.pth", "folder"])
def test_timm_loads_weights_and_preparation(tmp_path, capsys, out):
    import timm

    encoder, code = exported(tmp_path, capsys, "resnet18", "timm", out)
    torch.testing.assert_close(features(code["model"]), features(encoder), atol=1e-5, rtol=1e-5)
    # Where images are tested at another size than they were trained, as timm's own weights of this name are.
    for use_test_size in (False, True):
        assert_feeds_as_ours(timm.data.resolve_model_data_config(code["model"], use_test_size=use_test_size))
    path = tmp_path / out
    if path.is_dir():
        assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
        assert json.loads((path / "config.json").read_text())["fastsiam"] == encoder.description
    else:
        assert described(path) == encoder.description
        model = timm.create_model("resnet18", num_classes=0, checkpoint_path=path).eval()
        torch.testing.assert_close(features(model), features(encoder), atol=1e-5, rtol=1e-5)
        overlay = json.loads(path.with_name(f"{out}.json").read_text())["pretrained_cfg"] | {"file": str(path)}
        model = timm.create_model("resnet18", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
        assert_feeds_as_ours(timm.data.resolve_model_data_config(model, use_test_size=True))
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
        torch.testing.assert_close(pooled, features(encoder), atol=1e-5, rtol=1e-5)


@pytest.mark.needs("timm")
@pytest.mark.parametrize("out", ["network.safetensors", "folder"])
def test_timm_loads_its_own_networks(tmp_path, capsys, out):
    encoder, code = exported(tmp_path, capsys, "timm:mobilenetv3_small_050", "timm", out)
    torch.testing.assert_close(features(code["model"]), features(encoder), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers_loads_model_and_processor(tmp_path, capsys, name):
    from transformers import ResNetModel

    encoder, code = exported(tmp_path, capsys, name, "huggingface", "folder")
    pooled = code["model"](images()).pooler_output.flatten(1)
    torch.testing.assert_close(pooled, features(encoder), atol=1e-5, rtol=1e-5)
    _, report = ResNetModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert {key: len(found) for key, found in report.items()} == dict.fromkeys(report, 0)
    assert code["model"].config.fastsiam == encoder.description
    assert tuple(code["processor"].image_mean) == IMAGENET_MEAN


def picture(path, height=160, width=240):
    """Waves of up to 0.1 cycles a pixel, in which a shift or another scale shows."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 * (1 + np.sin(x * x * k / width + y * y * k / height)) for k in (0.1, 0.2, 0.3)]
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(path)
    return path


@pytest.mark.slow
@pytest.mark.needs("timm", "transformers")
def test_prepared_images_are_those_of_our_evaluation(tmp_path, capsys):
    """Sizes at which no side is rounded: 56 is 0.875 of 64, and 140 of 160. Bicubic at 0.95 is far off."""
    import timm

    size = "views.size=56"
    _, of_timm = exported(tmp_path, capsys, "resnet18", "timm", "timm", size)
    _, of_transformers = exported(tmp_path, capsys, "resnet18", "huggingface", "transformers", size)
    (tmp_path / "images").mkdir()
    image = Image.open(picture(tmp_path / "images/waves.png"))
    source = open_source(str(tmp_path / "images"), "data.train")
    spec = ViewSpec(size=56, color="exact")
    loader = open_evaluation_loader(source, spec, batch_size=1, crop_ratio=0.875, backend="pil", workers=0)
    (batch,) = loader.batches()
    ours = batch.images[0]
    config = timm.data.resolve_model_data_config(of_timm["model"])
    assert (timm.data.create_transform(**config)(image) - ours).abs().mean() < 0.01
    wrong = timm.data.create_transform(**config | {"interpolation": "bicubic", "crop_pct": 0.95})(image)
    assert (wrong - ours).abs().mean() > 0.3
    theirs = of_transformers["processor"](image, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == (3, 56, 56)
    assert (theirs - ours).abs().mean() < 0.01


def detectron2_names():
    """Names in a state dict of detectron2's R-50 (its modeling/backbone/resnet.py), as the class builds them."""
    modules = ["stem.conv1"]
    for stage, blocks in zip(("res2", "res3", "res4", "res5"), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            inner = ("shortcut", "conv1", "conv2", "conv3") if block == 0 else ("conv1", "conv2", "conv3")
            modules += [f"{stage}.{block}.{name}" for name in inner]
    norms = ("weight", "bias", "running_mean", "running_var")
    return [name for module in modules for name in (f"{module}.weight", *(f"{module}.norm.{end}" for end in norms))]


def as_torchvision(name):
    """By replacements, as detectron2's tools/convert-torchvision-to-d2.py does it the other way round."""
    name = name.removeprefix("stem.")
    for stage in range(1, 5):
        name = name.replace(f"res{stage + 1}.", f"layer{stage}.")
    for number in range(1, 4):
        name = name.replace(f"conv{number}.norm", f"bn{number}")
    return name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


def test_detectron2_has_its_own_names_and_the_same_network(tmp_path, capsys):
    encoder, _ = exported(tmp_path, capsys, "resnet50", "detectron2", "r50.pkl")
    sidecar = json.loads((tmp_path / "r50.pkl.json").read_text())
    assert sidecar["merge_from_list"] == config_keys(encoder)
    data = (tmp_path / "r50.pkl").read_bytes()
    # A list of modules that any version of numpy has.
    called = {value for kind, value, _ in pickletools.genops(data) if kind.name in ("SHORT_BINUNICODE", "GLOBAL")}
    assert {"numpy", "ndarray", "builtins", "bytearray"} < called
    assert not [name for name in called if str(name).startswith(("numpy.", "numpy_", "torch"))]
    saved = pickle.loads(data)
    assert saved["matching_heuristics"] is True
    assert saved["__author__"] == "fastsiam"
    assert saved["fastsiam"] == encoder.description
    assert sorted(saved["model"]) == sorted(detectron2_names())
    assert {(type(value), value.dtype.str, value.flags.writeable) for value in saved["model"].values()} == {
        (np.ndarray, "<f4", True)
    }
    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()
    state = {as_torchvision(name): torch.from_numpy(value) for name, value in saved["model"].items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert torch.equal(features(model.eval()), features(encoder))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet34", [34, 1, 64, 64]), ("resnext101_32x8d", [101, 32, 8, 256]), ("wide_resnet50_2", [50, 1, 128, 256])],
)
def test_detectron2s_config_describes_the_network(name, expected):
    with torch.device("meta"):
        encoder = build_encoder(name, "imagenet", None, False)
    encoder.description = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    terms = config_keys(encoder)
    said = dict(zip(terms[::2], terms[1::2], strict=True))
    keys = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")
    assert [said[f"MODEL.RESNETS.{key}"] for key in keys] == expected
    assert (said["MODEL.RESNETS.STRIDE_IN_1X1"], said["INPUT.FORMAT"]) == (False, "RGB")
    # As detectron2's configs for torchvision's weights have them.
    assert said["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert said["MODEL.PIXEL_STD"] == [58.395, 57.12, 57.375]


@pytest.mark.slow
@pytest.mark.needs("onnx")
def test_onnxruntime_gives_the_features_of_any_batch_and_size(tmp_path, capsys):
    small = ("model.stem=cifar", "model.width=8", "views.size=32")
    encoder, code = exported(tmp_path, capsys, "cifar_resnet8", "onnx", "encoder.onnx", *small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.safetensors"]
    session = code["model"]
    assert [value.name for value in session.get_inputs()] == ["images"]
    for batch, height, width in ((1, 32, 32), (5, 32, 32), (2, 48, 80), (1, 224, 224)):
        given = images(batch, height, width)
        (found,) = session.run(["features"], {"images": given.numpy()})
        np.testing.assert_allclose(found, features(encoder, given), atol=1e-4, rtol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["fastsiam"]) == encoder.description
    assert [json.loads(said[key]) for key in ("mean", "std", "size", "crop_ratio")] == [
        list(IMAGENET_MEAN), list(IMAGENET_STD), 32, 0.875,
    ]  # fmt: skip
    assert said["interpolation"] == "bilinear"


def test_safetensors_is_read_as_the_run_is(tmp_path, capsys):
    encoder, code = exported(tmp_path, capsys, "resnet18", "safetensors", "copy.safetensors")
    model = code["model"]
    assert model.description == encoder.description
    assert (model.mean, model.std, model.training) == (encoder.mean, encoder.std, False)
    torch.testing.assert_close(model.state_dict(), encoder.state_dict(), atol=0, rtol=0)
    again, _ = exported(tmp_path, capsys, "resnet18", "torchvision", "other.safetensors")
    torch.testing.assert_close(fastsiam.load_encoder(tmp_path / "other.safetensors")(images()), again(images()))


def test_weights_that_lie_in_channels_last_are_written(tmp_path, capsys, monkeypatch):
    path = write_encoder(tmp_path / "encoder.safetensors")
    encoder = fastsiam.load_encoder(path).to(memory_format=torch.channels_last)
    monkeypatch.setattr("fastsiam.run.encoder_file.load_encoder", lambda path: encoder)
    exported(tmp_path, capsys, "resnet18", "safetensors", "copy.safetensors")
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("layer1.0.conv1.weight"), encoder.layer1[0].conv1.weight)
