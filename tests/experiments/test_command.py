"""fastsiam experiments from the command line: lists, mistakes, and an experiment that is killed and goes on."""

import json
import signal
import sys

import pytest

from fastsiam.__main__ import main
from fastsiam.experiments import __main__ as command
from fastsiam.experiments.experiments import EXPERIMENTS
from fastsiam.sweep import conduct
from tests.support.processes import run_python
from tests.support.refusals import refused
from tests.support.runs import lines, wait_for_step

FAKE = (sys.executable, "-m", "tests.support.fake_train")


@pytest.fixture
def unrehearsed(monkeypatch):
    """Without the rehearsal, which imports torch in a process of its own."""
    monkeypatch.setattr(conduct, "rehearse", lambda plan, known: [])


def test_the_list_has_tables_and_numbers_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experiments", "--list", "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[::2]] == list(EXPERIMENTS)
    assert "predictor         Table 1       8 runs: 4 variants, 2 seeds" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["predicter"], "no-such-experiment", "did you mean predictor?"),
        ([], "no-experiment", "stop_gradient"),
        (["predictor", "--seeds", "0"], "out-of-range", "--seeds"),
        (["predictor", "--budget", "20s"], "budget-too-small", "or more"),
        (["predictor", "--budget", "20min", "train.epochs=3"], "two-budgets", "leave one out"),
        (["predictor", "run.fresh=true"], "sweep-fresh", "run.name=NEW"),
        (["predictor", "method.name=moco"], "not-plain-simsiam", "method.name=simsiam"),
        (["predictor", "--config", "nowhere"], "no-such-config", "configs/"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments, code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("experiments", *arguments)
    assert error.code == code
    assert says in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_variants_runs_and_time(tmp_path, monkeypatch, unrehearsed, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--budget", "1h", "--seeds", "2", "--at-once", "2", "--dry-run"]
    assert main(["experiments", "predictor", "run.name=mine", *options]) == 0
    said = capsys.readouterr().out
    assert "variant   fixed random predictor (the paper: 1.5)" in said
    # 4 turns of two runs in 3600 s less their starts.
    assert f"about 1:00:00 in all, {(3600 - 4 * 5) // 4}s each" in said
    assert "run       runs/mine/none_seed=1" in said
    assert list(tmp_path.iterdir()) == []


def test_the_name_follows_from_what_is_asked():
    def name(*arguments):
        parsed = command._parser().parse_intermixed_args(["predictor", *arguments])
        base = command.base_of(command.load_config(parsed.config, parsed.overrides))
        return command._name(parsed, EXPERIMENTS["predictor"], base)

    assert name().startswith("predictor-quickstart-")
    # More seeds are the same experiment, unless a budget is divided over them.
    assert name("--seeds", "1") == name("--seeds", "5", "run.dir=elsewhere")
    budgets = {name("--budget", "1h"), name("--budget", "1h", "--seeds", "5"), name()}
    assert len(budgets | {name("train.epochs=3")}) == 4


def test_more_seeds_train_only_what_is_new(tmp_path, monkeypatch, unrehearsed, capsys):
    monkeypatch.setattr(conduct, "TRAINER", FAKE)
    arguments = ["experiments", "similarity", f"run.dir={tmp_path}", "run.name=made", "optimizer.base_lr=4"]
    assert main([*arguments, "--seeds", "1"]) == 0
    assert main([*arguments, "--seeds", "3"]) == 0
    starts = [json.loads(line)["name"] for line in (tmp_path / "made/starts.txt").read_text().splitlines()]
    assert starts == [f"{label}_seed={seed}" for seed in range(3) for label in ("cosine", "cross_entropy")]
    said = capsys.readouterr().out
    assert "open      cosine above cross-entropy: the paper by 4.9 points; ours by 0.0, within the spread" in said
    assert len((tmp_path / "made/results.jsonl").read_text().splitlines()) == 6
    text = (tmp_path / "made/report.html").read_text()
    # kNN 40, 41, 42 of the fake.
    assert text.count("41.0 ± 1.0") == 2
    assert "section 4.5" in text
    assert "A thin line is one seed" in text


@pytest.mark.slow
def test_a_killed_experiment_goes_on_and_trains_nothing_twice(tiny, tmp_path):
    """Killed with its runs while the first trains: that one resumes, and the page has both variants."""
    overrides = tiny("train.epochs=6", "evaluate.knn_every_epochs=3", "run.name=made", "checkpoint.every_seconds=0.1")
    arguments = ["stop_gradient", "--seeds", "1", *overrides]
    script = (
        "import sys\nfrom fastsiam.experiments import __main__ as command\nfrom fastsiam.sweep import conduct\n"
        "conduct.rehearse = lambda plan, known: []\n"
        "conduct.TRAINER = (sys.executable, '-m', 'tests.support.train_without_report')\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    first, second = (tmp_path / f"runs/made/{label}_seed=0" for label in ("with", "without"))
    process = run_python("-c", script, *arguments, wait=False)
    wait_for_step(process, first, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert not second.exists()
    done = run_python("-c", script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in lines(first) if line["kind"] == "resume"] != []
    made = [json.loads(line) for line in (tmp_path / "runs/made/results.jsonl").read_text().splitlines()]
    assert [(line["variant"], line["step"]) for line in made] == [("with", 60), ("without", 60)]
    assert made[0]["knn_top1"] == lines(first)[-1]["knn_top1"]
    before = (tmp_path / "runs/made/sweep.jsonl").read_text()
    again = run_python("-c", script, *arguments)
    assert again.returncode == 0
    assert (tmp_path / "runs/made/sweep.jsonl").read_text() == before
