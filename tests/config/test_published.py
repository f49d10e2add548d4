"""Published accuracies are looked up for a config; nothing between or beyond the rows is invented."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.published import (
    APPENDIX_D,
    CIFAR10_IMAGES,
    IMAGENET_IMAGES,
    LIGHTLY_128,
    LIGHTLY_512,
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
