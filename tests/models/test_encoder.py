"""Every encoder is the library's network without its classifier, and every batch norm in it has statistics per view."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsiam.config import load_config
from fastsiam.config.encoder_names import TORCHVISION, TORCHVISION_RESNETS
from fastsiam.methods import build_method
from fastsiam.models.batch_norm import _PerView, split_statistics
from fastsiam.models.encoder import build_encoder, build_on_meta, check_sizes
from tests.support.refusals import refuses

# One of each family: the side of its images and what is left out of its torchvision model.
FAMILIES = {
    "resnet18": (64, "fc"), "regnet_y_400mf": (64, "fc"), "shufflenet_v2_x0_5": (64, "fc"), "googlenet": (64, "fc"),
    "efficientnet_b0": (64, "classifier"), "mobilenet_v2": (64, "classifier"), "mobilenet_v3_small": (64, "classifier"),
    "mnasnet0_5": (64, "classifier"), "densenet121": (64, "classifier"), "convnext_tiny": (64, "classifier"),
    "swin_t": (64, "head"), "vit_b_32": (224, "heads"), "maxvit_t": (224, "classifier"),
}  # fmt: skip


def images(count, size, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_names_are_torchvisions():
    assert sorted(TORCHVISION) == sorted(torchvision.models.list_models(module=torchvision.models))
    assert len(set(TORCHVISION)) == len(TORCHVISION)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_on_our_features_gives_the_models_own_scores(name):
    size, place = FAMILIES[name]
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    theirs = getattr(torchvision.models, name)(**options).eval()
    torch.manual_seed(0)
    ours = build_encoder(name, "imagenet", None, False).eval()
    head = getattr(theirs, place)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected
    assert all(key.startswith(f"{place}.") for key in unexpected)
    views = images(2, size)
    with torch.no_grad():
        features = ours(views)
        scores = theirs(views)
        layers = list(head) if isinstance(head, nn.Sequential) else [head]
        kept = len(getattr(ours, place)) if isinstance(getattr(ours, place), nn.Sequential) else 0
        mine = nn.Sequential(*layers[kept:])(features)
    assert features.shape == (2, ours.num_features)
    torch.testing.assert_close(mine, scores, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "dim"), [("vgg11_bn", 512), ("alexnet", 256), ("squeezenet1_1", 512)])
def test_networks_without_a_pooled_layer_are_pooled(name, dim):
    torch.manual_seed(0)
    ours = build_encoder(name, "imagenet", None, False).eval()
    with torch.no_grad():
        features = ours(images(2, 96))
        torch.testing.assert_close(features, ours.features(images(2, 96)).mean((2, 3)), atol=1e-6, rtol=1e-5)
    assert features.shape == (2, dim) == (2, ours.num_features)
    assert all(key.startswith("features.") for key in ours.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_name_gives_pooled_features_at_224(name):
    encoder = build_on_meta(name, "imagenet", None)
    check_sizes(encoder, name, [224])
    known = encoder.state_dict().keys()
    with torch.random.fork_rng(devices=[]):
        build = getattr(torchvision.models, name)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        theirs = build(**options).state_dict().keys() if not name.startswith("regnet_y_128") else known
    assert known <= theirs


def test_resnets_have_torchvisions_names():
    for name in TORCHVISION_RESNETS[:3]:
        with torch.device("meta"):
            theirs = getattr(torchvision.models, name)().state_dict().keys()
        ours = build_on_meta(name, "imagenet", None).state_dict().keys()
        assert theirs - ours == {"fc.weight", "fc.bias"}
        assert ours <= theirs


TIMM = [("resnet10t", 64), ("efficientnet_lite0", 64), ("mobilenetv3_small_050", 64), ("vit_tiny_patch16_224", 224)]


@pytest.mark.needs("timm")
@pytest.mark.parametrize(("name", "size"), TIMM)
def test_timms_models_are_those_of_timm(name, size):
    import timm

    torch.manual_seed(0)
    ours = build_encoder(f"timm:{name}", "imagenet", None, False).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        features = ours(images(2, size))
        assert torch.equal(features, theirs(images(2, size)))
    assert features.shape == (2, ours.num_features)
    check_sizes(build_on_meta(f"timm:{name}", "imagenet", None), name, [size])


@pytest.mark.needs("timm")
def test_zero_init_residual_is_the_resnets_of_timm_own_switch():
    for zero in (True, False):
        encoder = build_encoder("timm:resnet10t", "imagenet", None, zero)
        assert bool((encoder.layer1[0].bn2.weight == 0).all()) == zero
    with refuses("zero-init-of-resnets", "model.zero_init_residual"):
        build_encoder("timm:efficientnet_lite0", "imagenet", None, True)
    with refuses("unknown-encoder", "model.encoder") as error:
        build_encoder("timm:resnet51", "imagenet", None, False)
    assert "did you mean timm:resnet" in str(error.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with refuses("no-timm", "model.encoder") as error:
        build_encoder("timm:resnet50", "imagenet", None, False)
    assert "pip install -e '.[timm]'" in str(error.value)


def _randomless(encoder):
    """Dropout and stochastic depth off, which draw at each call."""
    for layer in encoder.modules():
        for rate in ("p", "drop_prob"):
            if isinstance(getattr(layer, rate, None), float):
                setattr(layer, rate, 0.0)
    return encoder


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:efficientnet_lite0", "efficientnet_b0"])
def test_views_at_once_are_separate_calls(name, compiled):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = _randomless(build_encoder(name, "imagenet", None, False)).double()
    split = split_statistics(copy.deepcopy(plain), 2)
    norms = [layer for layer in split.modules() if isinstance(layer, _BatchNorm)]
    assert len(norms) > 10
    assert all(isinstance(layer, _PerView) for layer in norms)
    call = torch.compile(split, fullgraph=True, backend="eager") if compiled else split
    first, second = images(4, 64).double(), images(4, 64, seed=1).double() + 1
    expected = torch.cat([plain(first), plain(second)])
    got = call(torch.cat([first, second]))
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    joint = copy.deepcopy(plain)(torch.cat([first, second]))
    assert (joint - expected).abs().max() > 1e-3
    torch.testing.assert_close(dict(split.named_buffers()), dict(plain.named_buffers()), atol=1e-9, rtol=1e-9)


class Scaled(nn.BatchNorm2d):
    """A batch norm with a forward of its own, as a library might have one."""

    def forward(self, x):
        return 2 * super().forward(x)


def of_timm():
    """Batch norm, dropout and activation in one layer."""
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(3, act_layer=nn.SiLU, inplace=False)


LAYERS = {
    "timm's with its activation": of_timm,
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "without affine": lambda: nn.BatchNorm2d(3, affine=False),
    "without running statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "3d": lambda: nn.BatchNorm3d(3),
    "forward of its own": lambda: Scaled(3),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_form_of_batch_norm_is_per_view(kind, compiled):
    if kind.startswith("timm"):
        pytest.importorskip("timm")
    torch._dynamo.reset()
    plain = LAYERS[kind]().double()
    split = split_statistics(copy.deepcopy(plain), 2)
    call = torch.compile(split, fullgraph=True, backend="eager") if compiled else split
    for step in range(3):
        views = [images(4, 5, seed=2 * step + view).double() + view for view in range(2)]
        views = [view.unsqueeze(-1) for view in views] if kind == "3d" else views
        expected = torch.cat([plain(view) for view in views])
        torch.testing.assert_close(call(torch.cat(views)), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(split.state_dict(), plain.state_dict(), atol=1e-13, rtol=1e-13)


def test_norms_over_no_batch_stay_and_unknown_ones_do_not_train_on_several_ranks():
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3))
    kinds = [type(layer) for layer in model]
    assert [type(layer) for layer in split_statistics(model, 2, world_size=2)] == kinds
    with refuses("norm-of-one-rank", "model.encoder"):
        split_statistics(nn.Sequential(Scaled(3)), 2, world_size=2)


@pytest.mark.parametrize("name", ["efficientnet_b0", "timm:efficientnet_lite0"])
def test_a_method_trains_any_encoder(tiny_config, name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    method = build_method(tiny_config(f"model.encoder={name}", "model.stem=imagenet", "model.width=null"))
    loss = method([images(8, 32)])["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


SIZES = {
    "vit_b_16": ([224, 128], "set views.size=224 without"),
    "inception_v3": ([64], "set views.size=224"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_an_encoder_does_not_take_are_refused(name):
    sizes, cure = SIZES[name]
    with refuses("size-of-encoder", "views.size") as error:
        check_sizes(build_on_meta(name, "imagenet", None), name, sizes)
    assert cure in str(error.value)


REFUSED = {
    "resnet51": (["model.encoder=resnet51"], "unknown-encoder"),
    "efficientnet": (["model.encoder=efficientnet_b9"], "unknown-encoder"),
    "timm weights": (["model.encoder=timm:resnet50.a1_in1k"], "weights-as-encoder"),
    "timm path": (["model.encoder='timm:a b'"], "unknown-encoder"),
    "stem": (["model.encoder=densenet121", "model.width=null", "model.stem=cifar"], "stem-of-resnets"),
    "stem of timm": (["model.encoder=timm:resnet50", "model.width=null", "model.stem=cifar"], "stem-of-resnets"),
    "zero": (
        ["model.encoder=densenet121", "model.width=null", "model.stem=imagenet", "model.zero_init_residual=true"],
        "zero-init-of-resnets",
    ),
    "partial": (["model.weights_partial=true"], "partial-of-nothing"),
    "no name": (["model.weights=''"], "empty-name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_name_no_encoder_are_refused_without_torch(case):
    overrides, code = REFUSED[case]
    with refuses(code):
        load_config("quickstart", overrides)
