"""The shipped configs against the paper's numbers, and the lists of where they differ from it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastsiam.config import CONFIGS, differing_keys, load_config
from fastsiam.config.published import TABLE_2
from fastsiam.kernels import reference
from fastsiam.methods import build_method
from fastsiam.models.batch_norm import PerViewBatchNorm1d, PerViewBatchNorm2d
from fastsiam.optim.build import parameter_groups

RACE = Path(__file__).parents[2] / "benchmarks/race/cifar10_cpu.yaml"

# SimSiam (arXiv 2011.10566): section 4 "Baseline settings", appendix A, Tables 1 and 4; kNN as its authors run it.
IMAGENET = {
    "views.recipe": "simsiam",
    "views.count": 2,
    "views.size": 224,
    "views.color": "exact",
    "views.crop_scale": (0.2, 1.0),
    "views.flip": 0.5,
    "views.jitter": 0.8,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.4,
    "views.hue": 0.1,
    "views.grayscale": 0.2,
    "views.blur": 0.5,
    "views.blur_sigma": (0.1, 2.0),
    "views.blur_kind": "pil",
    "views.solarize": 0.0,
    "views.mean": (0.485, 0.456, 0.406),
    "views.std": (0.229, 0.224, 0.225),
    "model.encoder": "resnet50",
    "model.stem": "imagenet",
    "model.zero_init_residual": True,
    "method.projector.layers": 3,
    "method.projector.hidden": 2048,
    "method.projector.out": 2048,
    "method.predictor.hidden": 512,
    "model.bn_statistics": "per_view",
    "method.name": "simsiam",
    "method.stop_gradient": True,
    "optimizer.name": "sgd",
    "optimizer.base_lr": 0.05,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "optimizer.schedule": "cosine_per_epoch",
    "optimizer.warmup": 0.0,
    "optimizer.predictor_lr": "fixed",
    "train.epochs": 100,
    "train.batch_size": 512,
    "evaluate.knn_k": 200,
    "evaluate.knn_temperature": 0.2,
    "evaluate.crop_ratio": 224 / 256,
}

# Appendix D: "ResNet-18 ... 3x3 conv of stride 1, without max pooling", 2-layer projector, no blur.
CIFAR10 = IMAGENET | {
    "views.recipe": "simsiam_cifar10",
    "views.size": 32,
    "views.blur": 0.0,
    "views.mean": (0.4914, 0.4822, 0.4465),
    "views.std": (0.2470, 0.2435, 0.2616),
    "model.encoder": "resnet18",
    "model.stem": "cifar",
    "method.projector.layers": 2,
    "optimizer.base_lr": 0.03,
    "optimizer.weight_decay": 5e-4,
    "train.epochs": 800,
    "evaluate.crop_ratio": 1.0,
}

PAPERS = ("r50_100ep", "r50_100ep_b4096", "r18_cifar10_800ep")


def head_of(name):
    """The comment at the head of a config, on one line."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    return " ".join(text[: text.index("data:\n")].replace("#", "").split())


@pytest.mark.parametrize(("name", "paper"), [("r50_100ep", IMAGENET), ("r18_cifar10_800ep", CIFAR10)])
def test_the_config_holds_the_papers_numbers(name, paper):
    config = load_config(name)
    for key, expected in paper.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
            value = value[0] if part == "views" else value
        assert value == expected, key


def test_images_of_cifar_lie_in_memory_as_they_are():
    assert load_config("r18_cifar10_800ep").data.store_size == 32


def test_the_recipe_from_memory_differs_from_the_papers_where_its_head_says():
    """1,281,167 x 160 x 160 x 3 bytes."""
    ours, papers = (load_config(name) for name in ("r50_160px_resident", "r50_100ep"))
    assert differing_keys(papers, ours) == [
        "data.backend (auto, now resident)",
        "data.store_size (None, now 160)",
        "views.size (224, now 160)",
    ]
    assert f"{1_281_167 * 160 * 160 * 3 / 1e9:.1f} GB of the GPU's memory" in head_of("r50_160px_resident")


def test_the_recipe_for_large_batches_is_the_papers_but_for_its_optimizer():
    """SimCLR (arXiv 2002.05709), section 2.2: 4.8 = 0.3 x 4096 / 256, weight decay 1e-6, 10 epochs of warm-up."""
    ours, papers = (load_config(name) for name in ("r50_100ep_b4096", "r50_100ep"))
    assert differing_keys(papers, ours) == [
        "optimizer.base_lr (0.05, now 0.3)",
        "optimizer.name (sgd, now lars)",
        "optimizer.warmup (0.0, now 0.1)",
        "optimizer.weight_decay (0.0001, now 1e-06)",
        "train.batch_size (512, now 4096)",
    ]
    assert ours.learning_rate == pytest.approx(4.8)
    assert ours.optimizer.warmup * ours.train.epochs == pytest.approx(10)
    rows = f"{TABLE_2[4096]} % at this batch with SGD, against {TABLE_2[512]} % at 256 and 512"
    assert rows in head_of("r50_100ep_b4096")


@pytest.mark.parametrize(
    ("name", "base", "epochs", "budget"),
    [("r50_8h", "r50_100ep", 100, "8h"), ("r18_cifar10_20min", "r18_cifar10_800ep", 800, "20min")],
)
def test_the_recipes_for_a_budget_differ_in_their_end(name, base, epochs, budget):
    assert differing_keys(load_config(base), load_config(name)) == [
        f"budget (None, now {budget})",
        f"train.epochs ({epochs}, now None)",
    ]


def test_the_recipe_for_minutes_of_a_cpu_is_the_races():
    """The race's rate is for cores that see three times as many images; its compilation is on no clock."""
    race = load_config(RACE)
    assert differing_keys(race, load_config("r8_cifar10_10min")) == [
        "budget (None, now 10min)",
        "optimizer.base_lr (0.4, now 0.8)",
        "train.compile (on, now auto)",
        f"train.epochs ({race.train.epochs}, now None)",
    ]


def test_the_epochs_that_eight_hours_are_said_to_hold():
    """1,281,167 images an epoch."""
    text = head_of("r50_8h")
    rates = [int(rate.replace(",", "")) for rate in re.search(r"make ([\d,]+) to ([\d,]+) images/s", text).groups()]
    epochs = re.search(r"are (\d+) to (\d+) epochs", text).groups()
    assert [round(8 * 3600 * rate / 1_281_167) for rate in rates] == [int(number) for number in epochs]


@pytest.mark.parametrize("name", PAPERS)
def test_the_deviations_are_what_the_code_does(name):
    config = load_config(name)
    backend = "resident" if name == "r18_cifar10_800ep" else "auto"
    assert (config.train.precision, config.data.backend, config.views[0].color) == ("auto", backend, "exact")
    assert reference.BLUR_TAPS == 13
    with torch.device("meta"):
        method = build_method(config)
    # No item speaks of batch norm: its statistics are over each view of the whole batch, as the authors' synchronised.
    norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(module) for module in norms} == {PerViewBatchNorm1d, PerViewBatchNorm2d}
    lars = [group["adapt"] for group in parameter_groups(method, config) if "adapt" in group]
    assert set(lars) == ({True, False} if name == "r50_100ep_b4096" else set())
    linear = [module for module in method.modules() if isinstance(module, nn.Linear)]
    # The predictor's output is the only linear layer without a batch norm behind it.
    assert [layer.bias is not None for layer in linear] == [False] * (len(linear) - 1) + [True]
