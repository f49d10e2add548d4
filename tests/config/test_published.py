"""What is published, looked up for a config: rows as they are, nothing between or beyond them invented."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.published import (
    APPENDIX_D,
    CIFAR10_IMAGES,
    IMAGENET_IMAGES,
    LIGHTLY_128,
    LIGHTLY_512,
    TABLE_4,
    batch_size_text,
    look_up,
    worth,
)


def test_the_tables_are_the_published_ones():
    assert TABLE_4.rows == {100: 68.1, 200: 70.0, 400: 70.8, 800: 71.3}
    assert APPENDIX_D.rows == {800: 91.8}
    assert (LIGHTLY_512.rows, LIGHTLY_128.rows) == ({200: 76.4, 800: 90.4}, {200: 81.9})


@pytest.mark.parametrize(
    ("epochs", "below", "above", "text"),
    [
        (70, None, 100, "has no number below 100 epochs (68.1 % there;"),
        (100, 100, 100, "has 68.1 % for 100 epochs"),
        (150.5, 100, 200, "has between 68.1 % and 70.0 %, its rows of 100 and 200 epochs"),
        (800, 800, 800, "has 71.3 % for 800 epochs"),
        (801, 800, None, "has no number above 800 epochs (71.3 % there;"),
    ],
)
def test_epochs_fall_on_a_row_between_two_or_outside(epochs, below, above, text):
    found = look_up(TABLE_4, epochs)
    assert (found.below, found.above) == (below, above)
    assert text in str(found)


def test_a_config_finds_the_tables_of_its_recipe_and_of_its_batch_size():
    found, reason = worth(load_config("r50_100ep", ["train.batch_size=256"]), IMAGENET_IMAGES, 100)
    assert ([one.table for one in found], reason) == ([TABLE_4], None)
    for batch_size, lightly in ((512, LIGHTLY_512), (64, LIGHTLY_128)):
        config = load_config("r18_cifar10_800ep", [f"train.batch_size={batch_size}"])
        found, reason = worth(config, CIFAR10_IMAGES, 800)
        assert ([one.table for one in found], reason) == ([APPENDIX_D, lightly], None)


@pytest.mark.parametrize(
    "free",
    [
        "data.train=elsewhere",
        "train.epochs=200",
        "train.precision=fp32",
        "views.color=matrix",
        "optimizer.schedule=cosine",
        "optimizer.warmup=0.1",
        "budget=8h",
    ],
)
def test_what_does_not_change_the_recipe_keeps_the_table(free):
    found, _ = worth(load_config("r50_100ep", [free]), IMAGENET_IMAGES, 200)
    assert [one.below for one in found] == [200]


@pytest.mark.parametrize(
    ("overrides", "images", "expected"),
    [
        (["views.size=160"], IMAGENET_IMAGES, "views.size differ from the recipe"),
        (["optimizer.base_lr=0.1"], IMAGENET_IMAGES, "optimizer.base_lr differ from the recipe"),
        (["optimizer.schedule=constant"], IMAGENET_IMAGES, "optimizer.schedule differ"),
        ([], 64, "of ImageNet's 1,281,167 images, and these are 64"),
        (["model.encoder=resnet18"], IMAGENET_IMAGES, "no published numbers are known for this model"),
    ],
)
def test_another_recipe_model_or_data_set_has_no_table(overrides, images, expected):
    found, reason = worth(load_config("r50_100ep", overrides), images, 100)
    assert found == []
    assert expected in reason


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (512, "has 68.1 % at batch 512 ("),
        (3000, "has 67.9 % at batch 2048 and 64.0 % at 4096"),
        (32, "ends at batch 64 with 66.1 %"),
        (8192, "ends at batch 4096 with 64.0 %"),
    ],
)
def test_batch_sizes_are_looked_up_in_table_2(batch_size, expected):
    assert expected in batch_size_text(batch_size)
