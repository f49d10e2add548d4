"""Configs of the other methods: one component away from SimSiam's, and the authors' numbers with their deviations."""

import math
import re

import pytest
import torch
from torch import nn

from fastsiam.config import CONFIGS, differences, load_config
from fastsiam.config import published as tables
from fastsiam.config.views import RECIPES
from fastsiam.config.yaml_file import flat
from fastsiam.kernels import reference
from fastsiam.methods import build_method
from fastsiam.models.batch_norm import PerViewBatchNorm1d, PerViewBatchNorm2d
from fastsiam.optim.build import parameter_groups, scale_at
from fastsiam.optim.lars import trust_ratios

BASES = ("r50_100ep", "r18_cifar10_800ep")
METHODS = ("byol", "simclr", "swav", "moco", "fastsiam")
ONE_AWAY = [(base, f"{base}_{method}") for base in BASES for method in METHODS]

_LARGE = {
    "model.encoder": "resnet50",
    "optimizer.name": "lars",
    "optimizer.momentum": 0.9,
    "optimizer.lars_trust": 0.001,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.1,
    "train.epochs": 100,
    "train.batch_size": 4096,
}
# Sources: the heads of the files.
AUTHORS = {
    "r50_100ep_byol_b4096": _LARGE
    | {
        "model.zero_init_residual": True,
        "model.bn_statistics": "per_view",
        "method.name": "byol",
        "method.projector": (2, 4096, 256, "hidden"),
        "method.predictor.hidden": 4096,
        "method.momentum": 0.99,
        "optimizer.base_lr": 0.45,
        "optimizer.weight_decay": 1e-6,
        "optimizer.lars_vectors": "exempt",
    },
    "r50_100ep_simclr_b4096": _LARGE
    | {
        "model.zero_init_residual": True,
        "model.bn_statistics": "joint",
        "method.name": "simclr",
        "method.projector": (3, 2048, 128, "all"),
        "method.temperature": 0.1,
        "optimizer.base_lr": 0.3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.lars_vectors": "exempt",
    },
    "r50_100ep_swav_b4096": _LARGE
    | {
        "model.zero_init_residual": False,
        "model.bn_statistics": "joint",
        "method.name": "swav",
        "method.projector": (2, 2048, 128, "hidden"),
        "method.prototypes": 3000,
        "method.temperature": 0.1,
        "method.epsilon": 0.05,
        "method.sinkhorn_iterations": 3,
        "method.queue": 0,
        "optimizer.base_lr": 0.3,
        "optimizer.weight_decay": 1e-6,
        "optimizer.lars_vectors": "adapted",
    },
    "r50_200ep_moco": {
        "model.encoder": "resnet50",
        "model.zero_init_residual": False,
        "model.bn_statistics": "per_view",
        "method.name": "moco",
        "method.projector": (2, 2048, 128, "none"),
        "method.temperature": 0.2,
        "method.momentum": 0.999,
        "method.queue": 65_536,
        "method.symmetric": False,
        "optimizer.name": "sgd",
        "optimizer.base_lr": 0.03,
        "optimizer.weight_decay": 1e-4,
        "optimizer.schedule": "cosine_per_epoch",
        "optimizer.warmup": 0.0,
        "train.epochs": 200,
        "train.batch_size": 256,
    },
    "r18_cifar10_800ep_moco_demo": {
        "model.encoder": "resnet18",
        "model.stem": "cifar",
        "model.zero_init_residual": False,
        "method.name": "moco",
        "method.projector": (1, 2048, 128, "none"),
        "method.temperature": 0.1,
        "method.momentum": 0.99,
        "method.queue": 4096,
        "method.symmetric": True,
        "optimizer.name": "sgd",
        "optimizer.base_lr": 0.03,
        "optimizer.weight_decay": 5e-4,
        "train.epochs": 800,
        "train.batch_size": 512,
        "evaluate.knn_k": 200,
        "evaluate.knn_temperature": 0.1,
    },
    "r18_cifar10_1000ep_simclr": {
        "model.encoder": "resnet18",
        "model.stem": "cifar",
        "model.bn_statistics": "joint",
        "method.name": "simclr",
        "method.projector": (3, 512, 128, "all"),
        "method.temperature": 0.5,
        "optimizer.name": "lars",
        "optimizer.base_lr": 1.0,
        "optimizer.weight_decay": 1e-4,
        "optimizer.warmup": 0.01,
        "train.epochs": 1000,
        "train.batch_size": 512,
    },
}
_COLOUR = ("brightness", "contrast", "saturation", "hue")
# Area from, colour jitter, probabilities of blur and solarizing, kind of blur, std of red.
VIEWS = {
    "byol_1": (0.08, (0.4, 0.4, 0.2, 0.1), 1.0, 0.0, "gaussian", 0.229),
    "byol_2": (0.08, (0.4, 0.4, 0.2, 0.1), 0.1, 0.2, "gaussian", 0.229),
    "byol_cifar10_1": (0.08, (0.4, 0.4, 0.2, 0.1), 0.0, 0.0, "gaussian", 0.247),
    "byol_cifar10_2": (0.08, (0.4, 0.4, 0.2, 0.1), 0.0, 0.2, "gaussian", 0.247),
    "simclr": (0.08, (0.8, 0.8, 0.8, 0.2), 0.5, 0.0, "gaussian", 1.0),
    "simclr_cifar10": (0.08, (0.4, 0.4, 0.4, 0.1), 0.0, 0.0, "gaussian", 1.0),
    "moco_cifar10": (0.08, (0.4, 0.4, 0.4, 0.1), 0.0, 0.0, "pil", 0.2023),
    "swav": (0.14, (0.8, 0.8, 0.8, 0.2), 0.5, 0.0, "pil", 0.228),
    "swav_small": (0.05, (0.8, 0.8, 0.8, 0.2), 0.5, 0.0, "pil", 0.228),
}
GROUPS = {
    "r50_100ep_byol_b4096": [("byol_1", 1, 224), ("byol_2", 1, 224)],
    "r50_100ep_simclr_b4096": [("simclr", 2, 224)],
    "r50_100ep_swav_b4096": [("swav", 2, 224), ("swav_small", 6, 96)],
    "r50_200ep_moco": [("moco", 2, 224)],
    "r18_cifar10_800ep_moco_demo": [("moco_cifar10", 2, 32)],
    "r18_cifar10_1000ep_simclr": [("simclr_cifar10", 2, 32)],
}


def text_of(name):
    return (CONFIGS / f"{name}.yaml").read_text()


def head_of(name):
    """The comment at the head of a config, on one line."""
    text = text_of(name)
    return " ".join(text[: text.index("data:\n")].replace("#", "").split())


@pytest.mark.parametrize(("base", "name"), ONE_AWAY)
def test_one_component_away_from_simsiam(base, name):
    """By value, and as a diff shows it: the same lines but for the comment, the method and FastSiam's views.count."""
    is_fastsiam = name.endswith("fastsiam")
    others = {key for key in differences(load_config(base), load_config(name)) if not key.startswith("method.")}
    assert others == ({"views.count"} if is_fastsiam else set())
    without = [re.sub(r"(?ms)\A.*?(?=^data:)|^method:\n.*?(?=^optimizer:)", "", text_of(n)) for n in (base, name)]
    assert without[0] == without[1].replace("  count: 4\n", "" if is_fastsiam else "  count: 4\n")
    assert f"{base}.yaml" in head_of(name)
    assert "No run has confirmed" in head_of(name) or "no run has confirmed" in head_of(name)


@pytest.mark.parametrize("base", BASES)
def test_fastsiam_is_the_mean_of_all_other_views(base):
    config = load_config(f"{base}_fastsiam")
    assert (config.views[0].count, config.method.target_views) == (4, 3)


@pytest.mark.parametrize("name", AUTHORS)
def test_a_config_holds_its_authors_numbers(name):
    config = load_config(name)
    values = flat(config.model_dump(exclude={"views"}))
    values["method.projector"] = tuple(config.method.projector.model_dump().values())
    assert {key: values[key] for key in AUTHORS[name]} == AUTHORS[name]
    assert [(group.recipe, group.count, group.size) for group in config.views] == GROUPS[name]
    assert {group.color for group in config.views} == {"exact"}
    for group in config.view_groups:
        # Nothing but size and colour is written beside the recipe.
        assert group.spec.numbers() in [recipe.numbers() for recipe in RECIPES.values()]


def test_views_are_the_authors():
    found = {
        name: (
            spec.crop_scale[0], tuple(getattr(spec, key) for key in _COLOUR), spec.blur, spec.solarize, spec.blur_kind,
            spec.std[0],
        )
        for name, spec in RECIPES.items() if name in VIEWS
    }  # fmt: skip
    assert found == VIEWS
    same = {name: (spec.flip, spec.jitter, spec.grayscale, spec.blur_sigma) for name, spec in RECIPES.items()}
    assert set(same.values()) == {(0.5, 0.8, 0.2, (0.1, 2.0))}
    assert {name: spec.crop_scale[1] for name, spec in RECIPES.items() if spec.crop_scale[1] < 1} == {
        "swav_small": 0.14
    }
    assert RECIPES["moco"] == RECIPES["simsiam"]


@pytest.mark.parametrize(
    ("name", "epochs", "rows"),
    [
        ("r50_100ep_byol_b4096", 100, (tables.BYOL_4,)),
        ("r50_100ep_simclr_b4096", 100, (tables.SIMCLR, tables.SIMCLR_4)),
        ("r50_100ep_swav_b4096", 100, (tables.SWAV,)),
        ("r50_200ep_moco", 200, (tables.MOCO, tables.MOCO_4)),
        ("r18_cifar10_800ep_moco_demo", 800, (tables.MOCO_DEMO_SYMMETRIC, tables.MOCO_DEMO)),
        ("r18_cifar10_800ep_moco_demo", 200, (tables.MOCO_DEMO_SYMMETRIC, tables.MOCO_DEMO)),
    ],
)
def test_the_percentages_in_a_head_are_those_of_the_tables(name, epochs, rows):
    assert [f"{table.rows[epochs]} %" in head_of(name) for table in rows] == [True] * len(rows)


def test_the_rates_that_the_heads_derive():
    simclr, byol, moco = (
        load_config(name) for name in ("r50_100ep_simclr_b4096", "r50_100ep_byol_b4096", "r50_200ep_moco")
    )
    assert simclr.learning_rate == pytest.approx(0.075 * math.sqrt(4096)) == pytest.approx(4.8)
    assert byol.learning_rate == pytest.approx(0.45 * 16)
    assert moco.learning_rate == pytest.approx(0.03)
    assert load_config("r18_cifar10_1000ep_simclr").learning_rate == pytest.approx(2.0)
    # 313 iterations at the authors', of 100 epochs as long.
    swav = load_config("r50_100ep_swav_b4096")
    assert round(swav.method.freeze_prototypes * 100 * 1_281_167 / 4096) == 313


@pytest.mark.parametrize("name", AUTHORS)
def test_the_deviations_are_what_the_code_does(name):
    config = load_config(name)
    backend = "resident" if "cifar10" in name else "auto"
    assert (config.train.precision, config.data.backend) == ("auto", backend)
    assert reference.BLUR_TAPS == 13
    with torch.device("meta"):
        method = build_method(config)
    norms = {type(module) for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    joint = config.model.bn_statistics == "joint"
    # MoCo's heads have none.
    per_view = {PerViewBatchNorm2d} if config.method.name == "moco" else {PerViewBatchNorm1d, PerViewBatchNorm2d}
    assert norms == ({nn.BatchNorm1d, nn.BatchNorm2d} if joint else per_view)
    adapt = {group.get("adapt", "all") for group in parameter_groups(method, config)}
    assert adapt == ({True, False} if config.optimizer.name == "lars" and "swav" not in name else {"all"})
    heads = [method.projector, getattr(method, "predictor", nn.Identity())]
    for head in heads:
        layers = list(head.modules())
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.Linear):
                assert (layer.bias is None) == isinstance(following, nn.modules.batchnorm._BatchNorm)


def test_lars_divides_by_the_sum_of_the_norms():
    """|g| + wd |w|, where BYOL's and SimCLR's authors have |g + wd w|."""
    w, g = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([-6.0, 8.0], dtype=torch.float64)
    assert trust_ratios([w], [g], 0.5, 1e-3, 0.0).item() == pytest.approx(1e-3 * 5 / (10 + 0.5 * 5))


@pytest.mark.parametrize("name", [name for name in AUTHORS if AUTHORS[name]["optimizer.name"] == "lars"])
def test_the_rate_rises_from_zero_and_falls_to_zero(name):
    settings = load_config(name).optimizer
    at = [scale_at(progress, settings.schedule, settings.warmup) for progress in (0.0, settings.warmup, 1.0)]
    assert at == pytest.approx([0.0, 1.0, 0.0])
    assert settings.warmup * load_config(name).train.epochs == pytest.approx(10)


def test_the_target_of_byol_begins_as_a_copy():
    config = load_config("r18_cifar10_800ep_byol", ["model.encoder=cifar_resnet8", "model.width=8"])
    method = build_method(config)
    online = dict(method.named_parameters())
    assert all(torch.equal(p, online[name]) for name, p in method.target.named_parameters())
