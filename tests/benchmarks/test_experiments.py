"""The record of the paper's experiments: from an experiment's lines to result lines, block of the page and picture."""

import json

import pytest
import torch

from benchmarks import tables
from benchmarks.experiments import __main__ as command
from benchmarks.experiments import lines as experiment_lines
from benchmarks.experiments import plot
from benchmarks.harness.results import Results
from fastsiam.config import load_config
from fastsiam.experiments.base import Base
from fastsiam.experiments.experiments import EXPERIMENTS
from tests.support.bench_configs import MACHINE
from tests.support.refusals import refuses

COMMIT = MACHINE["commit"]
CURVE = {"loss": [[64, -0.5], [128, None]], "std_ratio": [[128, 0.9]], "knn_top1": [[64, 30.0], [128, 40.0]]}


def line(row, seed, knn, status="done", commit=COMMIT[:12]):
    case = {one.row: one for one in EXPERIMENTS["stop_gradient"].cases(BASE)}[row]
    return {
        "experiment": "stop_gradient", "source": "Figure 2", "row": row, "variant": case.label, "title": case.title,
        "seed": seed, "config_hash": f"{row}{seed}", "budget": "10 epochs", "images_seen": 128, "step": 2,
        "status": status, "knn_top1": knn, "loss": -0.5, "std_ratio": 0.9, "rankme": 5.0, "seconds": 60.0 + seed,
        "said": "", "paper_top1": case.paper.top1, "paper_ended": case.paper.ended, "curves": CURVE, "commit": commit,
        "machine": {"cpu_threads": 1},
    }  # fmt: skip


BASE = Base(load_config(command.BASE), 8000)


@pytest.fixture
def results(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.results.environment", lambda device: dict(MACHINE))
    return Results(None, torch.device("cpu"))


@pytest.fixture
def collected(results, tmp_path):
    """A function that makes result lines of an experiment's lines."""

    def collect(*lines):
        folder = tmp_path / "runs/stop_gradient"
        folder.mkdir(parents=True)
        (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        setting = {"data": "cifar10", "images": 8000, "val": 2000}
        return experiment_lines.collected(results, tmp_path / "runs", BASE.config, setting)

    return collect


def four():
    return [line("with", 0, 38.0), line("with", 1, 40.0), line("without", 0, 25.0, "collapsed"),
            line("without", 1, 24.0, "collapsed")]  # fmt: skip


def test_the_block_has_the_papers_numbers_ours_and_the_findings(collected):
    text = tables.fill("<!-- table: experiments -->\n<!-- /table -->", {"experiments": [collected(*four())]}, "page")
    assert "8000, val 2000, encoder cifar_resnet8, width 16, size 16, batch 64, length 10 epochs, n = 2;" in text
    assert "| with stop-gradient | 67.7 | 39.0 ± 1.4 | 2 |" in text
    assert "| without stop-gradient | 0.1, collapsed | 24.5 ± 0.7 | 2 |" in text
    assert "- holds: without stop-gradient: collapsed in the paper; ours collapsed, 2 seeds" in text
    assert (
        "- holds: with stop-gradient above without stop-gradient: the paper by 67.6 points; ours by 14.5 ± 1.4" in text
    )


def test_the_file_is_one_that_tables_read(collected, tmp_path):
    out = tmp_path / "results/2026-01-31_epyc"
    made = collected(*four())
    command.write(out, made)
    (read,) = tables.read_all(tmp_path / "results")["experiments"]
    assert read == made
    assert {path.name for path in out.iterdir()} == {"experiments.jsonl", "stop_gradient.png", "stop_gradient.svg"}
    assert str(tmp_path) not in (out / "experiments.jsonl").read_text()


@pytest.mark.parametrize("commit", ["f" * 12, f"{COMMIT[:12]}-dirty", None])
def test_runs_of_another_commit_are_refused(collected, commit):
    with refuses("other-commit", "--runs"):
        collected(line("with", 0, 38.0, commit=commit))


def test_a_page_without_experiments_says_so():
    assert experiment_lines.text({}) == "No experiment has been recorded yet."


def test_a_mean_is_of_images_that_all_have():
    assert plot.mean_curve([[[1, 2.0], [2, 4.0], [3, 1.0]], [[1, 4.0], [2, None], [3, 2.0]]]) == [(1, 3.0), (3, 1.5)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_of_the_base_is_a_config(name):
    for case in EXPERIMENTS[name].cases(BASE):
        BASE.config.with_values(case.values)
