"""Weights by the names that torchvision and timm give them, with a local stand-in for the download."""

import os
import sys

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from fastsiam.run.start_weights import start_weights
from fastsiam.run.weight_files import sha256_of_tensors
from fastsiam.runtime.distributed import World
from tests.support.foreign_weights import RESNET, loaded, resnet18, sha256
from tests.support.refusals import refuses


def test_published_weights_of_torchvision_by_name(tiny_config, tmp_path, monkeypatch):
    network = resnet18(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    file = tmp_path / "hub/checkpoints" / os.path.basename(torchvision.models.ResNet18_Weights.DEFAULT.url)
    torch.save(network.state_dict(), file)
    for name in ("ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.DEFAULT"):
        encoder, weights = loaded(tiny_config(*RESNET, f"model.weights=torchvision:{name}"))
        assert torch.equal(encoder.conv1.weight, network.conv1.weight)
        assert (weights.record["source"], weights.record["sha256"]) == (f"torchvision:{name}", sha256(file))
    file.write_bytes(file.read_bytes()[:1000000])
    with refuses("damaged-checkpoint", "model.weights"):
        start_weights(tiny_config(*RESNET, "model.weights=torchvision:DEFAULT"), World())
    for name in ("ResNet50_Weights.IMAGENET1K_V2", "IMAGENET1K_V9"):
        with refuses("unknown-weights", "model.weights") as error:
            start_weights(tiny_config(*RESNET, f"model.weights=torchvision:{name}"), World())
        assert "torchvision:ResNet18_Weights.IMAGENET1K_V1" in str(error.value)
    with refuses("unknown-weights", "model.weights"):
        start_weights(tiny_config("model.weights=torchvision:DEFAULT"), World())


def test_a_download_that_fails_is_one_sentence(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(url, path, *_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with refuses("download-failed", "model.weights") as error:
        start_weights(tiny_config(*RESNET, "model.weights=torchvision:DEFAULT"), World())
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth could not be downloaded" in str(error.value)


def test_without_timm_its_weights_are_what_is_refused(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with refuses("no-timm", "model.weights"):
        start_weights(tiny_config(*RESNET, "model.weights=timm:resnet18.a1_in1k"), World())


@pytest.mark.needs("timm")
def test_published_weights_of_timm_by_name(tiny_config, tmp_path, monkeypatch):
    import timm

    torch.manual_seed(4)
    theirs = timm.create_model("resnet10t", num_classes=1000)
    file = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), file)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: load_file(file))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    keys = ("model.encoder=timm:resnet10t", "model.stem=imagenet", "model.width=null")
    encoder, weights = loaded(tiny_config(*keys, "model.weights=timm:resnet10t.c3_in1k"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        encoder(images), theirs.eval().forward_head(theirs.forward_features(images), pre_logits=True), atol=1e-6, rtol=0
    )
    assert weights.record["sha256"] == sha256(file)
    with refuses("unknown-weights", "model.weights") as error:
        start_weights(tiny_config(*keys, "model.weights=timm:resnet10t.a1_in1k"), World())
    assert "did you mean timm:resnet10t.c3_in1k" in str(error.value)

    def fail(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with refuses("download-failed", "model.weights"):
        start_weights(tiny_config(*keys, "model.weights=timm:resnet10t.c3_in1k"), World())


def test_tensors_without_a_file_have_a_hash_of_their_own():
    state = {"a": torch.ones(2), "b": torch.zeros(())}
    digest = sha256_of_tensors(state)
    assert digest == sha256_of_tensors(dict(reversed(state.items())))
    assert digest != sha256_of_tensors(state | {"b": torch.ones(())})
