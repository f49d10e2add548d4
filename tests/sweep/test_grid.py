"""Values as they are typed, and the runs that they come to."""

import pytest

from fastsiam.sweep.grid import parse, variants_of
from tests.support.refusals import refuses


def values(*arguments):
    return parse(arguments).values


def test_commas_separate_values_outside_of_brackets_and_quotes():
    assert values("optimizer.base_lr=0.02,0.05,1e-1") == {"optimizer.base_lr": ["0.02", "0.05", "1e-1"]}
    heads = values("method.projector={layers: 2, hidden: 8, out: 8},{layers: 3, hidden: 8, out: 8}")
    assert heads["method.projector"] == ["{layers: 2, hidden: 8, out: 8}", "{layers: 3, hidden: 8, out: 8}"]
    assert values("views.crop_scale=[0.2,1],[0.08, 1]") == {"views.crop_scale": ["[0.2,1]", "[0.08, 1]"]}
    grid = parse(["data.train='a,b'", "views.crop_scale=[0.2,1]", "train.epochs=3"])
    assert (grid.values, grid.overrides) == ({}, ("data.train='a,b'", "views.crop_scale=[0.2,1]", "train.epochs=3"))


def test_a_range_is_one_of_integers_where_the_key_takes_integers_alone():
    assert values("train.seed=0..2") == {"train.seed": ["0", "1", "2"]}
    assert values("train.seed=0..1,7") == {"train.seed": ["0", "1", "7"]}
    assert values("evaluate.knn_every_epochs=1..2") == {"evaluate.knn_every_epochs": ["1", "2"]}
    # Of one value there is nothing to compare.
    assert parse(["train.seed=4..4"]).overrides == ("train.seed=4",)
    for whole in ("views.size=16..32", "data.deep_pixels=0..255", "optimizer.base_lr=1..2", "no.such=1..2"):
        assert parse([whole]).overrides == (whole,)
    assert values("views.size=16..32,32") == {"views.size": ["16..32", "32"]}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["optimizer.base_lr=0.1,"], "empty-value"),
        (["optimizer.base_lr=,"], "empty-value"),
        (["train.seed=2..0"], "empty-range"),
        (["train.seed=0..99999999999"], "many"),
        (["train.seed=0..1", "train.seed=3"], "given-twice"),
        (["run.name=a,b"], "one-value"),
    ],
)
def test_what_is_no_grid_is_refused(arguments, code):
    with refuses(code, arguments[0].partition("=")[0]):
        parse(arguments)


def test_variants_are_the_product_with_seeds_innermost():
    grid = parse(["train.seed=0,5", "optimizer.base_lr=0.1,0.2", "train.epochs=3", "optimizer.warmup=0.0,0.5"])
    found = variants_of("quickstart", grid)
    seen = [(v.config.optimizer.base_lr, v.config.optimizer.warmup, v.seed) for v in found]
    assert seen == [(lr, warmup, seed) for lr in (0.1, 0.2) for warmup in (0.0, 0.5) for seed in (0, 5)]
    assert {v.config.train.epochs for v in found} == {3}
    assert found[1].name == "base_lr=0.1_warmup=0.0_seed=5"
    assert [v.label for v in found[:3]] == ["base_lr=0.1_warmup=0.0"] * 2 + ["base_lr=0.1_warmup=0.5"]
    assert found[0].values == {"base_lr": "0.1", "warmup": "0.0"}


def test_keys_of_one_last_part_are_named_in_full():
    grid = parse(["method.projector.hidden=16,32", "method.predictor.hidden=8,16"])
    assert set(grid.short.values()) == {"method.projector.hidden", "method.predictor.hidden"}
    assert variants_of("quickstart", grid)[0].values["method.projector.hidden"] == "16"


def test_names_of_folders_are_names_of_runs():
    grid = parse(["views.crop_scale=[0.2,1],[0.08,1]", f"data.val={'x' * 300},null"])
    names = [variant.name for variant in variants_of("quickstart", grid)]
    assert len(set(names)) == 4
    for variant in variants_of("quickstart", grid):
        assert variant.config.with_values({"run.name": variant.name}).run.name == variant.name


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (["optimizer.base_lr=0.1,0.10"], "same-setting", "base_lr=0.1_seed=0 and base_lr=0.10_seed=0"),
        (["optimizer.base_lrr=0.1,0.2"], "unknown-key", "optimizer.base_lr?"),
        (["optimizer.base_lr=0.1,x"], "wrong-type", "'x'"),
        (["train.seed=0..99", "evaluate.knn_k=1..11"], "many", "100 of train.seed x 11 of evaluate.knn_k are 1,100"),
    ],
)
def test_grids_that_cannot_be_trained_are_refused(arguments, code, names):
    with refuses(code) as caught:
        variants_of("quickstart", parse(arguments))
    assert names in str(caught.value)
