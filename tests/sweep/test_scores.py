"""Mean, spread, who goes on and what is said of it, against numbers computed by hand."""

from pathlib import Path

import pytest

from fastsiam.config import load_config
from fastsiam.sweep import scores
from fastsiam.sweep.ledger import Ended, Ledger
from fastsiam.sweep.plan import Variant, plan_of

CONFIG = load_config("quickstart")


@pytest.fixture
def known(tmp_path):
    """A function giving plan and ledger of {label: scores of seeds} by round; a text is a status without a score."""

    def make(*rounds, halving=False):
        variants = [
            Variant(label, CONFIG.with_values({"train.seed": seed}), seed, {"lr": label})
            for label, found in rounds[0].items()
            for seed in range(len(found))
        ]
        plan = plan_of(variants, tmp_path, halving=halving)
        ledger = Ledger(tmp_path)
        for number, ends in enumerate(rounds):
            for label, found in ends.items():
                for seed, score in enumerate(found):
                    name = next(one.name for one in variants if (one.label, one.seed) == (label, seed))
                    failed = isinstance(score, str)
                    more = {"status": score if failed else "done", "exit_code": 0}
                    ledger.add(Ended(name, label, seed, number, knn_top1=None if failed else score, **more))
        return plan, ledger

    return make


def test_mean_and_sample_deviation():
    found = scores.measured([50.0, 52.0, 57.0, None])
    # Deviations from 53: -3, -1, 4; 26 / 2 = 13.
    assert (found.n, found.mean, found.spread) == (3, 53.0, pytest.approx(13**0.5))
    assert scores.measured([4.0]) == scores.Measured(1, 4.0, None)
    assert scores.measured([None, float("nan")]) is None


def test_seeds_are_judged_together_and_failures_come_last(known):
    plan, ledger = known({
        "a": [90.0, 10.0], "b": [60.0, 58.0], "c": [99.0, "collapsed"], "d": ["refused", "refused"], "e": [70.0, 40.0],
    })  # fmt: skip
    rows = scores.table(plan, ledger)
    assert [row.label for row in rows] == ["b", "e", "a", "c", "d"]
    assert [row.status for row in rows[2:]] == ["done", "1 done, 1 collapsed", "refused"]
    assert rows[4].score is None


def test_the_better_half_goes_on_by_its_mean(known):
    first = {"a": [40.0, 44.0], "b": [50.0, 30.0], "c": [41.0, 45.0], "d": [60.0, "collapsed"]}
    plan, ledger = known(first, {"a": [70.0, 72.0], "c": [71.0, 65.0]}, halving=True)
    assert scores.taking_part(plan, ledger, 1) == ["c", "a"]
    rows = scores.table(plan, ledger)
    assert [(row.label, row.share) for row in rows] == [("a", 1.0), ("c", 1.0), ("b", 0.5), ("d", 0.5)]
    # What the dropped ones had is kept as it was; those that went on have their last numbers.
    assert [row.score.mean for row in rows] == [71.0, 68.0, 40.0, 60.0]
    assert scores.at_round(plan, ledger, "a", 0).score.mean == 42.0


def test_a_lead_is_compared_with_the_spread_of_seeds(known, tmp_path):
    def sentence(*rounds, **options):
        (tmp_path / "sweep.jsonl").unlink(missing_ok=True)
        plan, ledger = known(*rounds, **options)
        return scores.verdict(plan, ledger, scores.table(plan, ledger))

    # Means 51 and 45; deviations sqrt(2) and sqrt(8).
    assert sentence({"a": [44.0, 48.0 - 2], "b": [50.0, 52.0]}) == (
        "b: kNN 51.00 ± 1.41 % over 2 seeds; 6.00 points above a, more than the spread of seeds (1.41)"
    )
    assert "not more than the spread of seeds (8.49)" in sentence({"a": [39.0, 51.0], "b": [50.0, 52.0]})
    assert "one seed does not tell" in sentence({"a": [45.0], "b": [50.0]})
    assert sentence({"a": [45.0], "b": ["collapsed"]}) == "a: kNN 45.00 %; nothing to compare it with"
    assert sentence({"a": ["refused"], "b": ["collapsed"]}) == "no run has a result to compare"
    # A setting without all of its seeds may have the higher mean.
    partly = sentence({"a": [45.0, 47.0], "b": [90.0, "stuck"]})
    assert partly == "a: kNN 46.00 ± 1.41 % over 2 seeds; b has kNN 90.00 % with 1 of 2 seeds"
    # Of two settings one alone trains to the end: the lead is that of the round in which both took part.
    halved = sentence({"a": [45.0], "b": [50.0]}, {"b": [80.0]}, halving=True)
    assert halved.startswith("b: kNN 80.00 %; 5.00 points above a at 50 % of the schedule")
    # Where it collapses on its way, the other is what is left.
    assert sentence({"a": [45.0], "b": [50.0]}, {"b": ["collapsed"]}, halving=True).startswith("a: kNN 45.00 %")


def test_a_ledger_is_read_back(known, tmp_path):
    plan, ledger = known({"a": [1.0, "stuck"], "b": ["collapsed", 2.0]})
    ledger.begin(plan)
    again = Ledger(Path(tmp_path))
    assert [again.of(one.name, 0) for one in plan.variants] == [ledger.of(one.name, 0) for one in plan.variants]
    assert [again.is_final(one.name, 0) for one in plan.variants] == [True, False, True, True]
    assert again.plan["runs"] == [one.name for one in plan.variants]
