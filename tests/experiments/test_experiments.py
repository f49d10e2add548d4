"""Variants of the paper's experiments: valid configs that differ from the base in what the paper varied, no more."""

import pytest

from fastsiam.config import load_config
from fastsiam.config.load import differences
from fastsiam.experiments.base import Base, base_of
from fastsiam.experiments.experiments import EXPERIMENTS, experiment_named
from tests.support.refusals import refuses


@pytest.fixture(scope="module")
def base():
    """ImageNet's images with the paper's own config, so that sizes are the paper's."""
    config = load_config("r50_100ep", ["data.val=val", "train.batch_size=256", "optimizer.base_lr=0.05"])
    return Base(config, 1_281_167)


def changed(base, name):
    """Keys with their new values of each variant; None also for a key that has gone."""
    found = {}
    for case in EXPERIMENTS[name].cases(base):
        other = differences(base.config, base.config.with_values(case.values))
        found[case.row] = {key: now for key, (_, now) in other.items()}
    return found


NORM = "method.projector.norm", "method.predictor.norm"

EXPECTED = {
    "stop_gradient": {"with": {}, "without": {"method.stop_gradient": False}},
    "predictor": {
        "none": {f"method.predictor.{key}": None for key in ("hidden", "norm", "frozen")},
        "fixed": {"method.predictor.frozen": True},
        "decayed": {"optimizer.predictor_lr": "scheduled"},
        "constant": {},
    },
    "batch_size": {
        "64": {"train.batch_size": 64},
        "128": {"train.batch_size": 128},
        "256": {},
        "512": {"train.batch_size": 512},
        **{str(size): {"train.batch_size": size, "optimizer.warmup": 0.1} for size in (1024, 2048, 4096)},
    },
    "batch_norm": {
        "none": dict.fromkeys(NORM, "none"),
        "hidden": {NORM[0]: "hidden"},
        "default": {},
        "all": {NORM[1]: "all"},
    },
    "similarity": {"cosine": {}, "cross_entropy": {"method.similarity": "cross_entropy"}},
    "symmetry": {
        "symmetric": {},
        "asymmetric": {"method.symmetric": False},
        "asymmetric_2x": {"method.symmetric": False, "views.count": 4},
    },
    "output_dimension": {
        "256": {"method.projector.out": 256, "method.predictor.hidden": 64},
        "512": {"method.projector.out": 512, "method.predictor.hidden": 128},
        "1024": {"method.projector.out": 1024, "method.predictor.hidden": 256},
        "2048": {},
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_variants_differ_in_what_the_paper_varied(base, name):
    assert changed(base, name) == EXPECTED[name]


def test_other_methods_have_the_bases_heads(base):
    def methods(name):
        cases = EXPERIMENTS[name].cases(base)
        return {case.row: base.config.with_values(case.values).method for case in cases}

    alternating = methods("alternating")
    assert {row: method.steps for row, method in alternating.items()} == {"1": 1, "10": 10, "100": 100, "epoch": 5004}
    assert {method.predictor for method in alternating.values()} == {base.config.method.predictor}
    average = methods("moving_average")["average"]
    assert (average.name, average.images, average.momentum) == ("simsiam_average", 1_281_167, 0.8)
    simclr = {row: (method.predictor and method.predictor.hidden, method.stop_gradient)
              for row, method in methods("simclr").items()}  # fmt: skip
    assert simclr == {"simclr": (None, False), "predictor": (512, False), "stop_gradient": (512, True)}
    swav = {row: (method.predictor and method.predictor.hidden, method.stop_gradient, method.prototypes, method.queue)
            for row, method in methods("swav").items()}  # fmt: skip
    assert swav == {"swav": (None, True, 3000, 3840), "predictor": (512, True, 3000, 3840),
                    "gradient": (None, False, 3000, 3840)}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_variants_have_names_rows_and_claims_of_their_own(base, name):
    found = EXPERIMENTS[name]
    cases = found.cases(base)
    assert len({case.label for case in cases}) == len({case.title for case in cases}) == len(cases) > 1
    assert {row for claim in found.claims for row in (claim.better, claim.worse)} <= {case.row for case in cases}
    papers = {case.row: case.paper.top1 for case in cases}
    for claim in found.claims:
        # What is claimed is what the paper's own numbers say.
        better, worse = papers[claim.better], papers[claim.worse]
        assert worse is None or better > worse, claim


def test_sizes_follow_the_base():
    small = Base(load_config("quickstart", ["data.val=val"]), 300)
    sizes = [case.values["train.batch_size"] for case in EXPERIMENTS["batch_size"].cases(small)]
    # A batch has no more images than the data.
    assert sizes == [16, 32, 64, 128, 256]
    dims = [case.values["method.projector.out"] for case in EXPERIMENTS["output_dimension"].cases(small)]
    assert dims == [32, 64, 128, 256]


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("method.name=byol", "not-plain-simsiam", "method.name"),
        ("method.stop_gradient=false", "not-plain-simsiam", "method.stop_gradient"),
        ("method.similarity=cross_entropy", "not-plain-simsiam", "method.similarity"),
        ("method.predictor=null", "not-plain-simsiam", "method.predictor"),
        ("method.predictor.frozen=true", "not-plain-simsiam", "method.predictor"),
        ("views.count=4", "two-views", "views.count"),
        ("data.val=null", "no-measure", "data.val"),
        ("data.val=nowhere", "no-measure", "data.val"),
        ("data.train=nowhere", "absent", "data.train"),
    ],
)
def test_a_base_is_plain_simsiam_with_images_for_knn(override, code, key, tiny):
    with refuses(code, key):
        base_of(load_config("quickstart", tiny(override)))


def test_a_base_has_curves_and_knn_of_what_collapses(tiny, demo_folder):
    base = base_of(load_config("quickstart", tiny("evaluate.knn_every_epochs=null", "train.epochs=40")))
    assert (base.config.collapse.action, base.config.evaluate.knn_every_epochs) == ("warn", 4)
    assert (base.images, base.steps_per_epoch) == (80, 10)


def test_a_misspelt_name_gets_the_nearest_one():
    with refuses("no-such-experiment", "NAME") as caught:
        experiment_named("stop-gradiant")
    assert "did you mean stop_gradient?" in str(caught.value)
