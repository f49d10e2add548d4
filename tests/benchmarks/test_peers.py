"""The peers that benchmarks compare with: the same function as ours, or absent with a sentence."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastsiam
from benchmarks.peers import AbsentError, authors, lightly, solo_learn
from fastsiam.config import load_config
from fastsiam.config.views import IMAGENET_MEAN, IMAGENET_STD, ViewGroup, ViewSpec
from fastsiam.optim.build import build_optimizer
from tests.support.bench_configs import CPU, batches, small_config

GROUPS = (ViewGroup(2, ViewSpec(size=16, color="exact")),)


def our_step(config, dtype=torch.float32):
    """A step written out with the public pieces, the model, and a copy of its initial weights."""
    torch.manual_seed(0)
    method = fastsiam.build_method(config).to(dtype)
    weights = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = build_optimizer(method, config)

    def step(views):
        optimizer.zero_grad()
        loss = method([views])["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, method, weights


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("r18_cifar10_800ep", 16), ("r50_100ep", 32)])
def test_the_authors_step_is_ours_in_the_settings_that_are_timed(name, size):
    """In float64, because fp32's rounding grows to 1e-2 in ten steps; without zero-init, so that all branches move."""
    heads = [f"method.projector.{key}=64" for key in ("hidden", "out")]
    numbers = ["train.batch_size=4", "optimizer.base_lr=6.4", "model.zero_init_residual=false"]
    config = load_config(name, [*heads, *numbers])
    step, method, weights = our_step(config, torch.float64)
    theirs = authors.build_step(config, weights, CPU)
    theirs.model.double().load_state_dict(weights)
    for views in batches(2, images=4, size=size, dtype=torch.float64):
        assert abs(theirs(views).item() - step(views).item()) <= 1e-10
    found = theirs.model.state_dict()
    for key, value in method.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)
    assert min((value - weights[key]).abs().max() for key, value in method.named_parameters()) > 1e-6


def test_the_authors_model_has_plain_batch_norm_and_no_bias_before_it():
    config = load_config("r18_cifar10_800ep")
    model = authors.SimSiam(config.model, config.method)
    assert {type(layer) for layer in model.modules() if "Norm" in type(layer).__name__} == {
        torch.nn.BatchNorm1d,
        torch.nn.BatchNorm2d,
    }
    biases = [name for name, layer in model.named_modules() if getattr(layer, "bias", None) is not None]
    assert biases.count("predictor.3") == 1
    assert not [name for name in biases if isinstance(model.get_submodule(name), torch.nn.Linear | torch.nn.Conv2d)][1:]


@pytest.mark.parametrize("layers", [2, 3])
def test_peers_that_are_installed_follow_our_losses(layers):
    config = small_config(layers)
    step, _, weights = our_step(config)
    builders = {"authors": authors.build_step}
    if importlib.util.find_spec("lightly"):
        builders["lightly"] = lightly.build_step
    steps = {name: build(config, weights, CPU) for name, build in builders.items()}
    for views in batches(3):
        expected = step(views).item()
        assert {name: peer(views).item() for name, peer in steps.items()} == pytest.approx(
            dict.fromkeys(steps, expected), abs=1e-5
        )


def test_lightly_absent_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightly", None)
    config = small_config()
    with pytest.raises(AbsentError, match="pip install lightly"):
        lightly.build_step(config, {}, CPU)
    with pytest.raises(AbsentError, match="pip install lightly"):
        lightly.build_loader([], groups=GROUPS, batch_size=2, workers=0, device=CPU)


def test_solo_learn_absent_says_what_to_do(monkeypatch, tmp_path):
    config = small_config()
    with pytest.raises(AbsentError):
        solo_learn.build_step(config, {}, CPU, None)
    with pytest.raises(AbsentError, match=str(tmp_path)):
        solo_learn.build_step(config, {}, CPU, tmp_path)
    # A checkout whose requirements are not there.
    (tmp_path / "solo" / "methods").mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").touch()
    (tmp_path / "solo" / "methods" / "__init__.py").touch()
    (tmp_path / "solo" / "methods" / "simsiam.py").write_text("import package_that_is_not_there\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "solo"]:
        monkeypatch.delitem(sys.modules, name)
    for build in (solo_learn.build_loader, solo_learn.build_dali_loader):
        with pytest.raises(AbsentError, match="package_that_is_not_there"):
            build([], tmp_path, groups=GROUPS, batch_size=2, workers=0, device=CPU)
    for name in [name for name in sys.modules if name.partition(".")[0] == "solo"]:
        del sys.modules[name]


def test_the_authors_views_have_the_papers_probabilities():
    """400 images of two views: grey 0.2, flipped 0.5, within three standard deviations of a binomial; the values'
    range is that of ToTensor and Normalize."""
    ramp = np.linspace(30, 220, 64).astype(np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (64, 1)), np.full((64, 64), 128), np.full((64, 64), 60)], 2).astype(np.uint8)
    )
    transform = authors.build_transform(ViewSpec(size=24, color="exact"))
    torch.manual_seed(0)
    views = torch.stack([view for _ in range(400) for view in transform(image)])
    rgb = views * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert -1e-6 < rgb.min() <= rgb.max() < 1 + 1e-6
    grey = (rgb.amax(1) - rgb.amin(1)).amax((1, 2)) < 2 / 255
    falling = rgb.mean(1)[:, :, :4].mean((1, 2)) > rgb.mean(1)[:, :, -4:].mean((1, 2))
    assert abs(grey.float().mean() - 0.2) < 3 * (0.2 * 0.8 / 800) ** 0.5
    assert abs(falling.float().mean() - 0.5) < 3 * (0.5 * 0.5 / 800) ** 0.5


def test_the_authors_loader_gives_two_views_of_each_file_once(photos):
    """Files of one colour each: which file a view comes from can be read from it."""
    torch.manual_seed(0)
    paths = sorted(str(path) for path in photos.rglob("*.jpg"))
    batches = list(authors.build_loader(paths, groups=GROUPS, batch_size=4, workers=0, device=CPU))
    assert len(paths) == 15
    assert [len(x) for batch in batches for x in batch] == [4] * 6
    assert {tuple(x.shape[1:]) for batch in batches for x in batch} == {(3, 16, 16)}
