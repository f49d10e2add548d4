"""The encoder's weights are found under any prefix; features are those of the network that the file was made of."""

import pytest
import torch
import torchvision
from torch import nn

from fastsiam.models.encoder import build_encoder, build_on_meta
from fastsiam.models.weights import find, flatten, look_alike, not_finite
from tests.support.foreign_weights import FORMATS, body, features, resnet18, under

# Names of a ResNet-18 without the counters of its 20 batch norms: 20 convolutions, 20 x 4.
TENSORS = 100


@pytest.fixture(scope="module")
def networks():
    return resnet18(0), resnet18(1)


@pytest.mark.parametrize("project", FORMATS)
def test_each_projects_checkpoint_gives_the_features_of_its_network(networks, project, tmp_path):
    from fastsiam.run.weight_files import read_file

    if project == "lightly's example":
        pytest.importorskip("lightly")
    write, prefix = FORMATS[project]
    path = tmp_path / "checkpoint.pth.tar"
    # MoCo's and SwAV's published files are of torch 1.3.
    torch.save(write(*networks), path, _use_new_zipfile_serialization=project not in ("MoCo", "SwAV"))
    encoder = build_encoder("resnet18", "imagenet", None, False).eval()
    found = find(flatten(read_file(path)), encoder)
    path.unlink()
    assert (found.prefix, found.matched, found.needed) == (prefix, TENSORS, TENSORS)
    assert (found.missing, found.mismatched) == ([], {})
    encoder.load_state_dict(found.state, strict=False)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = features(networks[0], images)
    assert expected.std() > 0.1
    assert (features(networks[1], images) - expected).abs().max() > 0.1
    torch.testing.assert_close(encoder(images), expected, atol=1e-6, rtol=1e-6)


def test_what_else_the_file_holds_is_counted(networks):
    found = find(flatten(FORMATS["MoCo"][0](*networks)), build_on_meta("resnet18", "imagenet", None))
    assert found.dropped == ["fc.0.weight", "fc.2.weight"]
    # The key encoder with its counters and head, the queue and its pointer; not the optimizer.
    assert found.elsewhere == TENSORS + 20 + 2 + 2
    assert found.rivals == ["state_dict.module.encoder_k."]


def test_an_incomplete_network_is_not_replaced_by_its_momentum_copy(networks):
    contents = FORMATS["solo-learn"][0](*networks)
    del contents["state_dict"]["backbone.layer4.1.bn2.weight"]
    found = find(flatten(contents), build_on_meta("resnet18", "imagenet", None))
    assert (found.prefix, found.missing) == ("state_dict.backbone.", ["layer4.1.bn2.weight"])


def test_missing_counters_are_not_missed_and_other_shapes_are_named(networks):
    state = {name: value for name, value in body(networks[0]).items() if "num_batches" not in name}
    encoder = build_on_meta("resnet18", "cifar", None)
    found = find(state, encoder)
    assert found.missing == []
    assert found.mismatched == {"conv1.weight": ((64, 3, 7, 7), (64, 3, 3, 3))}
    assert (found.matched, len(found.state)) == (TENSORS - 1, TENSORS - 1)


def test_tensors_of_something_else_match_nothing():
    found = find(
        flatten({"a": torch.ones(3), "b": {"c": torch.ones(2)}, "n": 4}), build_on_meta("resnet18", "cifar", None)
    )
    assert (found.matched, len(found.missing)) == (0, TENSORS)
    assert flatten([1, 2]) == flatten(nn.Linear(1, 1)) == {}


def test_values_that_are_not_finite_are_named():
    state = {
        "a": torch.ones(3),
        "b": torch.tensor([1.0, torch.nan]),
        "c": torch.tensor([torch.inf]),
        "n": torch.tensor(2),
    }
    assert not_finite(state) == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "cifar"),
        ("resnet50", "imagenet"),
        ("wide_resnet50_2", "imagenet"),
        ("shufflenet_v2_x1_5", "imagenet"),
    ],
)
def test_a_network_is_known_by_its_tensors(name, stem):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
        if stem == "cifar":
            theirs.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    assert look_alike(under("module.", theirs.state_dict())) == (name, stem)


@pytest.mark.parametrize(
    ("larger", "smaller"), [("resnet34", "resnet18"), ("swin_s", "swin_t"), ("convnext_small", "convnext_tiny")]
)
def test_the_layers_of_a_larger_network_are_told_from_a_head(larger, smaller):
    with torch.device("meta"):
        theirs, ours = (getattr(torchvision.models, name)().state_dict() for name in (larger, smaller))
    encoder = build_on_meta(smaller, "imagenet", None)
    match = find(theirs, encoder)
    assert match.matched == match.needed
    # Of more blocks only; the classifiers are alike.
    assert set(match.deeper) == theirs.keys() - ours.keys()
    assert find(ours, encoder).deeper == []


def test_no_network_is_known_by_a_few_tensors_or_by_a_name_alone(networks):
    assert look_alike({"conv1.weight": torch.ones(64, 3, 7, 7)}, "resnet18") is None
    assert look_alike(body(networks[0]), "resnet50") == ("resnet18", "imagenet")
