"""Published accuracies are looked up for a config; nothing between or beyond the rows is invented."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.published import (
    APPENDIX_D,
    BYOL,
    BYOL_4,
    CIFAR10_IMAGES,
    IMAGENET_IMAGES,
    LIGHTLY_128,
    LIGHTLY_512,
    MOCO,
    MOCO_4,
    MOCO_DEMO,
    MOCO_DEMO_SYMMETRIC,
    SIMCLR,
    SIMCLR_4,
    SWAV,
    TABLE_4,
    Row,
    batch_size_text,
    look_up,
    published_for,
)

FIRST, SECOND, LAST = Row(100, 68.1), Row(200, 70.0), Row(800, 71.3)


@pytest.mark.parametrize(
    ("epochs", "below", "above"),
    [(70, None, FIRST), (100, FIRST, FIRST), (150.5, FIRST, SECOND), (800, LAST, LAST), (801, LAST, None)],
)
def test_epochs_fall_on_a_row_between_two_or_outside(epochs, below, above):
    found = look_up(TABLE_4, epochs)
    assert (found.below, found.above) == (below, above)
    assert all(f"{row.percent} % at {row.epochs}" in str(found) for row in (below, above) if row)


@pytest.mark.parametrize(
    ("name", "batch_size", "images", "tables"),
    [
        ("r50_100ep", 256, IMAGENET_IMAGES, (TABLE_4,)),
        ("r18_cifar10_800ep", 512, CIFAR10_IMAGES, (APPENDIX_D, LIGHTLY_512)),
        ("r18_cifar10_800ep", 64, CIFAR10_IMAGES, (APPENDIX_D, LIGHTLY_128)),
    ],
)
def test_a_config_finds_the_tables_of_its_recipe_and_of_its_batch_size(name, batch_size, images, tables):
    config = load_config(name, [f"train.batch_size={batch_size}"])
    assert published_for(config, images, 800) == (tuple(look_up(table, 800) for table in tables), None)


@pytest.mark.parametrize(
    ("name", "overrides", "tables"),
    [
        ("r50_100ep_byol_b4096", "", (BYOL_4,)),
        ("r50_100ep_byol_b4096", "optimizer.base_lr=0.2 optimizer.weight_decay=1.5e-6 method.momentum=0.996", (BYOL,)),
        ("r50_100ep_simclr_b4096", "", (SIMCLR, SIMCLR_4)),
        ("r50_100ep_swav_b4096", "method.freeze_prototypes=0.00125 views.1.color=matrix", (SWAV,)),
        ("r50_200ep_moco", "views.recipe=simsiam optimizer.predictor_lr=fixed", (MOCO, MOCO_4)),
        ("r18_cifar10_800ep_moco_demo", "", (MOCO_DEMO_SYMMETRIC,)),
        ("r18_cifar10_800ep_moco_demo", "method.symmetric=false", (MOCO_DEMO,)),
    ],
)
def test_each_method_finds_the_tables_of_its_recipe(name, overrides, tables):
    images = CIFAR10_IMAGES if "cifar10" in name else IMAGENET_IMAGES
    found = published_for(load_config(name, overrides.split()), images, 800)
    assert found == (tuple(look_up(table, 800) for table in tables), None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r50_100ep_byol", "optimizer.weight_decay differ from r50_100ep_byol_b4096.yaml, the recipe"),
        ("r50_100ep_fastsiam", "method.target_views, views.count differ from r50_100ep.yaml, the recipe"),
        ("r50_100ep_swav_b4096 views.1.count=4", "views.1.count differ from r50_100ep_swav_b4096.yaml, the recipe"),
        ("r50_100ep method.name=simsiam_alternating", "known for simsiam_alternating with this model"),
    ],
)
def test_a_method_in_another_setting_says_what_differs_from_its_nearest_recipe(name, expected):
    name, *overrides = name.split()
    found, reason = published_for(load_config(name, overrides), IMAGENET_IMAGES, 100)
    assert found == ()
    assert expected in reason


def test_a_number_of_multi_crop_says_so():
    assert str(look_up(SWAV, 100)).endswith("ImageNet linear top-1, batch 4096, multi-crop 2 x 224 + 6 x 96")


def test_keys_outside_the_recipe_keep_the_table():
    free = "data.train=elsewhere train.precision=fp32 views.color=matrix optimizer.schedule=cosine optimizer.warmup=0.1"
    found, _ = published_for(load_config("r50_100ep", [*free.split(), "budget=8h"]), IMAGENET_IMAGES, 200)
    assert [one.below for one in found] == [SECOND]


@pytest.mark.parametrize(
    ("override", "images", "expected"),
    [
        ("views.size=160", IMAGENET_IMAGES, "views.size"),
        ("optimizer.base_lr=0.1", IMAGENET_IMAGES, "optimizer.base_lr"),
        ("optimizer.schedule=constant", IMAGENET_IMAGES, "optimizer.schedule"),
        ("train.epochs=100", 64, "1,281,167"),
        ("model.encoder=resnet18", IMAGENET_IMAGES, "model"),
    ],
)
def test_another_recipe_model_or_data_set_has_no_table(override, images, expected):
    found, reason = published_for(load_config("r50_100ep", [override]), images, 100)
    assert found == ()
    assert expected in reason


def test_batch_sizes_are_looked_up_in_table_2():
    rows = {
        512: "68.1 % at 512 ",
        3000: "67.9 % at 2048 and 64.0 % at 4096 ",
        32: "66.1 % at 64 ",
        8192: "64.0 % at 4096 ",
    }
    assert [batch_size for batch_size, text in rows.items() if text not in batch_size_text(batch_size)] == []
