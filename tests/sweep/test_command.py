"""fastsiam sweep from the command line: mistakes, lists of runs, and real sweeps that are stopped and halved."""

import json
import signal
import sys

import pytest
import torch

from fastsiam.__main__ import main
from fastsiam.run.reading import ending
from fastsiam.sweep import __main__ as command
from fastsiam.sweep import conduct
from tests.support.processes import run_python
from tests.support.refusals import refused
from tests.support.runs import lines, train_here, wait_for_step, weights

QUIET = (sys.executable, "-m", "tests.support.train_without_report")
FAKE = (sys.executable, "-m", "tests.support.fake_train")
LR = "optimizer.base_lr=0.1,0.2"


@pytest.fixture
def typed(tiny):
    """Arguments of a tiny sweep."""
    return lambda *more: ["--config", "quickstart", *tiny("run.name=sweep"), *more]


@pytest.fixture
def unrehearsed(monkeypatch):
    """Without the rehearsal, which imports torch in a process of its own."""
    monkeypatch.setattr(conduct, "rehearse", lambda plan, known: [])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["optimizer.base_lrr=0.1,0.2"], "unknown-key", "did you mean optimizer.base_lr?"),
        (["optimizer.base_lr=0.1,"], "empty-value", "optimizer.base_lr=A,B"),
        (["train.epochs=3"], "nothing-to-compare", "fastsiam train"),
        (["optimizer.base_lr=0.1,1e-1"], "same-setting", "leave one"),
        (["train.seed=0..99", "evaluate.knn_k=1..11"], "many", "fewer"),
        (["train.seed=0..2", "--halving"], "one-setting", "several values"),
        ([LR, "--halving", "train.max_steps=3"], "halving-stops", "leave one"),
        ([LR, "--budget", "20s"], "budget-too-small", "or more"),
        ([LR, "--budget", "20"], "not-a-budget", "2h"),
        ([LR, "--budget", "20min", "train.epochs=3"], "two-budgets", "leave one out"),
        ([LR, "data.backend=synthetic", "data.val=null"], "no-measure", "data.train"),
        ([LR, "--at-once", "0"], "bad-at-once", "1 or more"),
        ([LR, "run.fresh=true"], "sweep-fresh", "run.name=NEW"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments, code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("sweep", "--config", "quickstart", *arguments)
    assert error.code == code
    assert says in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_runs_and_time(typed, unrehearsed, tmp_path, capsys):
    arguments = typed(LR, "optimizer.warmup=0.0,0.1", "train.seed=0..1", "--halving", "--dry-run")
    arguments.remove("train.epochs=2")
    assert main(["sweep", *arguments, "--budget", "1h", "--at-once", "2"]) == 0
    said = capsys.readouterr().out
    assert "8 runs: 2 of optimizer.base_lr, 2 of optimizer.warmup, 2 of train.seed (4 settings, 2 seeds)" in said
    # 4 turns to the half and 2 from there: 3 whole ones, in 3600 s less 6 starts.
    assert f"about 1:00:00 in all, {(3600 - 6 * 5) // 3}s for a run that trains to its end" in said
    assert f"{tmp_path}/runs/sweep/base_lr=0.2_warmup=0.1_seed=1" in said
    assert not (tmp_path / "runs").exists()


def test_on_another_number_of_gpus_runs_keep_their_budgets(typed, unrehearsed, monkeypatch, tmp_path):
    arguments = [text for text in typed("optimizer.base_lr=2,4", "--budget", "2min") if text != "train.epochs=2"]
    monkeypatch.setattr(conduct, "TRAINER", FAKE)
    ledger = tmp_path / "runs/sweep/sweep.jsonl"
    for number in ("1", "2"):
        assert main(["sweep", *arguments, "--at-once", number]) == 0
        # As if it had been stopped at once: the plan alone.
        ledger.write_text(ledger.read_text().splitlines()[0] + "\n")
    found = [json.loads(line) for line in (tmp_path / "runs/sweep/starts.txt").read_text().splitlines()]
    assert [start["budget"] for start in found] == ["55s"] * 4


@pytest.mark.slow
def test_what_no_run_would_start_with_is_refused_before_anything_is_written(typed, tmp_path):
    error = refused("sweep", *typed(LR, f"data.train={tmp_path}/nowhere"))
    assert error.key == "data.train"
    assert not (tmp_path / "runs").exists()


def test_it_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("sweep", "--config", "quickstart", LR).code == "one-process"


def test_the_name_follows_from_what_is_asked(monkeypatch):
    def name(*arguments):
        parsed = command._parser().parse_intermixed_args(["--config", "quickstart", *arguments])
        grid = command.grids.parse(parsed.overrides)
        return command._name(parsed, grid, command.load_config("quickstart", grid.overrides))

    assert name(LR, "train.seed=0..1").startswith("quickstart-base_lr-seed-")
    assert name(LR, "train.epochs=3") == name("train.epochs=3", LR, "run.dir=elsewhere")
    assert len({name(LR), name(LR, "--halving"), name(LR, "--budget", "1h"), name(f"{LR},0.3")}) == 4
    assert name(LR, "run.name=mine") == "mine"


@pytest.mark.slow
def test_a_survivor_of_halving_is_the_run_that_was_never_stopped(typed, tiny, unrehearsed, monkeypatch, tmp_path):
    monkeypatch.setattr(conduct, "TRAINER", QUIET)
    assert main(["sweep", *typed("optimizer.base_lr=0.1,1.6", "--halving")]) == 0
    folder = tmp_path / "runs/sweep"
    best, left_out = json.loads((folder / "sweep.json").read_text())["settings"]
    assert (best["share"], left_out["share"]) == (1.0, 0.5)
    first = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()][1:3]
    assert best["label"] == max(first, key=lambda line: line["knn_top1"])["label"]
    assert [lines(folder / f"{one['label']}_seed=0")[-1]["step"] for one in (best, left_out)] == [20, 10]
    alone = train_here(tiny(f"optimizer.{best['label']}"))[0]
    assert best["score"]["mean"] == alone.knn_top1
    survivor = weights(folder / f"{best['label']}_seed=0")
    torch.testing.assert_close(survivor, weights(tmp_path / "runs/run"), rtol=0, atol=0)


START = """
import sys
from fastsiam.sweep import __main__ as command
from fastsiam.sweep import conduct
conduct.rehearse = lambda plan, known: []
conduct.TRAINER = (sys.executable, "-m", "tests.support.train_without_report")
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_with_the_same_command(typed, tiny, tmp_path):
    """The run that trains resumes where the signal came, to the weights of an undisturbed one; the next one follows."""
    arguments = typed("train.seed=0..1", "train.epochs=6", "evaluate.knn_every_epochs=null")
    first, second = (tmp_path / f"runs/sweep/quickstart_seed={seed}" for seed in (0, 1))
    process = run_python("-c", START, *arguments, wait=False)
    wait_for_step(process, first, 5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 143
    assert "give the same command to go on" in said
    assert (ending(first), second.exists()) == ("preempted", False)
    done = run_python("-c", START, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (resumed,) = (line["step"] for line in lines(first) if line["kind"] == "resume")
    assert 5 <= resumed < 60
    train_here(tiny("train.epochs=6", "evaluate.knn_every_epochs=null"))
    torch.testing.assert_close(weights(first), weights(tmp_path / "runs/run"), rtol=0, atol=0)
    rows = json.loads((tmp_path / "runs/sweep/sweep.json").read_text())["settings"]
    knn = [lines(folder)[-1]["knn_top1"] for folder in (first, second)]
    assert rows[0]["score"] == {"n": 2, "mean": sum(knn) / 2, "spread": pytest.approx(abs(knn[0] - knn[1]) / 2**0.5)}
