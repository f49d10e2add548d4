"""Findings beside the paper's, on run folders made without a run."""

import json
import statistics

import pytest

from fastsiam.config import load_config
from fastsiam.experiments.base import Base
from fastsiam.experiments.experiments import EXPERIMENTS
from fastsiam.experiments.outcome import config_hash, result_lines, rows_of, verdicts
from fastsiam.sweep.ledger import Ended, Ledger
from fastsiam.sweep.plan import Variant, plan_of
from tests.support.run_folders import at, train_line, write_run

HEALTHY = {"std_ratio": 0.9, "effective_rank": 8.0, "mean_abs_cos": 0.3}
COLLAPSED = {"std_ratio": 0.02, "effective_rank": 5.0, "mean_abs_cos": 0.99}
TOLD = at("warning", 20, message="z has collapsed", code="collapsed")


def lines(measures, *, told=False, recovered=False):
    found = [train_line(step) for step in range(1, 31)] + [at("collapse", 20, **measures)]
    found += [TOLD] if told else []
    return [*found, at("collapse", 30, **(HEALTHY if recovered else measures))]


@pytest.fixture
def experiment(tmp_path):
    """A function that makes an experiment whose runs ended as told; {row: [kNN, "diverged" or ("collapsed", kNN)]}."""

    def make(name, ends):
        found, base = EXPERIMENTS[name], Base(load_config("quickstart"), 4000)
        cases, seeds = found.cases(base), len(next(iter(ends.values())))
        variants = [
            Variant(case.label, base.config.with_values({**case.values, "train.seed": seed}), seed)
            for case in cases
            for seed in range(seeds)
        ]
        plan = plan_of(variants, tmp_path / "experiment")
        ledger = Ledger(plan.folder)
        for case in cases:
            for seed, end in enumerate(ends.get(case.row, ())):
                run = f"{case.label}_seed={seed}"
                told = isinstance(end, tuple)
                knn = end[1] if told else end
                status = "not finite" if end == "diverged" else "done"
                measures = COLLAPSED if told else HEALTHY
                recovered = told and end[0] == "recovered"
                write_run(plan.folder / run, lines(measures, told=told, recovered=recovered), pictures=False)
                numbers = {} if end == "diverged" else {"knn_top1": knn, "loss": -0.5, "std_ratio": 0.5}
                ledger.add(Ended(run, case.label, seed, 0, status, 0, **numbers))
        return found, plan, rows_of(plan, ledger, cases)

    return make


def words(made):
    found, _, rows = made
    return [verdict.word for verdict in verdicts(found, rows)]


def test_mean_spread_and_status(experiment):
    _, _, rows = experiment(
        "stop_gradient", {"with": [60, 62, 67], "without": [("collapsed", 20), ("recovered", 30), 40]}
    )
    assert rows[0].knn.mean == 63
    assert rows[0].knn.spread == pytest.approx(statistics.stdev([60, 62, 67]))
    # kNN of a collapsed run counts; a run that came back after an alarm has not collapsed.
    assert (rows[1].knn.mean, rows[1].status) == (30, "1 collapsed, 2 done")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        # Whether it collapses, and whether the other is better.
        ({"with": [60, 62], "without": [("collapsed", 20), ("collapsed", 21)]}, ["holds", "holds"]),
        ({"with": [60, 62], "without": [("collapsed", 20), 21]}, ["open", "holds"]),
        ({"with": [60, 62], "without": [70, 72]}, ["differs", "differs"]),
        # Means 61 and 60.5, standard deviations 1.4 and 0.7.
        ({"with": [60, 62], "without": [60, 61]}, ["differs", "open"]),
        ({"with": [60, 62], "without": ["diverged", 61]}, ["open", "holds"]),
        ({"with": ["diverged", 62], "without": [60, 61]}, ["differs", "differs"]),
        ({"with": ["diverged", "diverged"], "without": ["diverged", ("collapsed", 9)]}, ["holds", "open"]),
        # One seed tells nothing but a collapse.
        ({"with": [60], "without": [20]}, ["differs", "open"]),
        ({"with": [60], "without": [("collapsed", 20)]}, ["holds", "holds"]),
        ({"with": [60, 62], "without": []}, ["open", "open"]),
    ],
)
def test_what_holds_of_the_paper(experiment, ends, expected):
    assert words(experiment("stop_gradient", ends)) == expected


def test_unstable_and_diverged(experiment):
    made = experiment(
        "batch_norm", {"none": [30, 31], "hidden": [60, 61], "default": [64, 65], "all": ["diverged"] * 2}
    )
    assert words(made) == ["holds", "holds", "holds", "holds"]
    assert made[2][-1].status == "diverged"


def test_claims_without_their_rows_are_left_out(experiment):
    # 4,000 images: batches of 16 to 1,024, which are all rows; with 300 the largest ones are missing.
    found, _, rows = experiment("batch_size", {"64": [60, 61]})
    assert len(verdicts(found, rows)) == 2
    assert len(verdicts(found, rows[:-1])) == 1


def test_result_lines_name_no_folder_and_keep_the_curves(experiment, tmp_path):
    found, plan, rows = experiment("stop_gradient", {"with": [60, 62], "without": ["diverged", ("collapsed", 20)]})
    made = result_lines(found, plan, rows)
    assert [(line["variant"], line["seed"], line["status"], line["knn_top1"]) for line in made] == [
        ("with", 0, "done", 60), ("with", 1, "done", 62), ("without", 0, "diverged", None),
        ("without", 1, "collapsed", 20),
    ]  # fmt: skip
    first = made[0]
    assert (first["images_seen"], first["paper_top1"], first["budget"]) == (120, 67.7, "8 epochs")
    assert first["curves"]["std_ratio"] == [[80, 0.9], [120, 0.9]]
    assert first["curves"]["loss"][-1] == [120, -0.75]
    assert str(tmp_path) not in json.dumps(made)
    hashes = [line["config_hash"] for line in made]
    assert len(set(hashes)) == 4


def test_the_hash_is_of_what_a_config_computes():
    config = load_config("quickstart")
    moved = config.with_values({"run.dir": "elsewhere", "data.train": "/images", "data.workers": 3})
    assert config_hash(moved) == config_hash(config)
    assert config_hash(config.with_values({"train.seed": 1})) != config_hash(config)
