"""Progress of runs that spend time or energy, by clocks that the tests turn."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastsiam.config import load_config
from fastsiam.optim.build import scale_at
from fastsiam.run import checkpoint
from fastsiam.run.evaluation_schedule import EvaluationSchedule
from fastsiam.run.run import Run
from fastsiam.runtime.distributed import World
from fastsiam.train import main, opened
from fastsiam.training.cost import CostMeter
from fastsiam.training.progress import Progress
from fastsiam.training.state import State
from tests.support.clocked_runs import Clock, Killed, Meter, spend, taking, train_lines
from tests.support.gloo_ranks import world as gloo_world
from tests.support.runs import lines, numbers, train_here, weights


def test_the_cosine_ends_when_the_budget_does(budgeted, monkeypatch, tmp_path):
    """100 s; a step takes 1 s, kNN 3: one kNN at a tenth of it, the last in the 3 s that are kept back."""
    clock = Clock()
    result = spend(budgeted("budget=100s"), clock, monkeypatch)
    assert (result.status, clock.now) == ("done", 100.0)
    steps = train_lines(tmp_path / "runs/run")
    # 10 steps before the price of kNN is known, and 97 - 3 - 10 after.
    assert result.step == len(steps) == 94
    progress = [line["progress"] for line in steps]
    assert progress[:10] == pytest.approx([(1 + i) / 100 for i in range(10)])
    assert progress[10:] == pytest.approx([(14 + i) / 97 for i in range(84)])
    assert progress[-1] == 1
    config = load_config("quickstart", budgeted("budget=100s"))
    # The eleventh step follows the kNN.
    before = [0.0, *progress[:9], 13 / 97, *progress[10:-1]]
    expected = [config.learning_rate * scale_at(p, "cosine", config.optimizer.warmup) for p in before]
    assert [line["lr"] for line in steps] == pytest.approx(expected)
    knn = [line["step"] for line in lines(tmp_path / "runs/run") if line["kind"] == "knn"]
    assert knn == [10, 94]
    end = lines(tmp_path / "runs/run")[-1]
    assert end["spent_seconds"] == pytest.approx(100)


def test_an_evaluation_is_left_out_where_it_would_take_the_last_ones_time(tiny, monkeypatch, tmp_path):
    """Ten steps an epoch and kNN after each: 30 s hold two epochs with theirs, and the third's is the last."""
    clock = Clock()
    result = spend(tiny("train.epochs=null", "budget=39s"), clock, monkeypatch)
    knn = [line["step"] for line in lines(tmp_path / "runs/run") if line["kind"] == "knn"]
    # At a tenth, after two epochs, and at the end; after the third epoch 36 s are spent and 3 are kept back.
    assert (knn, result.step, clock.now) == ([4, 10, 20, 27], 27, 39)


def test_a_long_evaluation_leaves_its_time(budgeted, monkeypatch, tmp_path):
    clock = Clock(evaluation=40.0)
    result = spend(budgeted("budget=100s"), clock, monkeypatch)
    assert (result.step, clock.now) == (20, 100)
    clock = Clock(evaluation=70.0)
    result = spend(budgeted("budget=100s", "run.name=longer"), clock, monkeypatch)
    # What cannot be kept ends the run at once: the kNN of the last step is there.
    assert (result.step, clock.now, result.knn_top1 is not None) == (10, 80, True)


def test_a_budget_that_the_start_has_used_up_says_so(budgeted, monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(Run, "begin", taking(clock, 30, Run.begin))
    result = spend(budgeted("budget=20s"), clock, monkeypatch)
    assert (result.status, result.step) == ("done", 0)
    (warning,) = [line["code"] for line in lines(tmp_path / "runs/run") if line["kind"] == "warning"]
    assert warning == "budget-spent-before-training"


def test_without_labels_the_spectrum_is_kept_back_and_max_steps_end_a_budget_before(budgeted, monkeypatch):
    """3 s at a tenth of the budget and 3 at its end."""
    for more, step in (((), 14), (("train.max_steps=7", "run.name=shorter"), 7)):
        clock = Clock()
        result = spend(budgeted("budget=20s", "data.val=null", *more), clock, monkeypatch)
        assert (result.step, clock.now) == (step, step + 6)


def test_a_run_goes_on_at_a_share_of_its_time_with_the_same_schedule(budgeted, monkeypatch, tmp_path):
    """100 s, of which the first half ends at progress 0.5, and kNN comes on top of it."""
    clock = Clock()
    half = spend(budgeted("budget=100s", "train.max_share=0.5"), clock, monkeypatch)
    # 97 s are left for steps; kNN at the tenth step, and 48.5 s spent after 46 steps and the first kNN.
    assert (half.status, half.step, clock.now) == ("done", 46, 46 + 3 + 3)
    whole = spend(budgeted("budget=100s"), clock, monkeypatch)
    assert (whole.status, clock.now) == ("done", 100)
    steps = train_lines(tmp_path / "runs/run")
    assert len(steps) == whole.step == 94 - 3
    config = load_config("quickstart", budgeted("budget=100s"))
    expected = [config.learning_rate * scale_at(line["progress"], "cosine", config.optimizer.warmup) for line in steps]
    assert [line["lr"] for line in steps[47:]] == pytest.approx(expected[46:-1])
    assert not [line for line in lines(tmp_path / "runs/run") if line.get("code") == "larger-budget"]


def test_a_run_that_goes_on_from_a_share_is_the_run_that_was_never_stopped(tiny, tmp_path):
    """Seven of 20 steps, in mid-epoch, then the rest."""
    once = train_here(tiny("run.name=once"))[0]
    part = train_here(tiny("train.max_share=0.37"))[0]
    assert (part.status, part.step, part.knn_top1 is not None) == ("done", 7, True)
    rest = train_here(tiny("train.max_share=1.0"))[0]
    assert (rest.step, rest.knn_top1) == (once.step, once.knn_top1)
    torch.testing.assert_close(weights(tmp_path / "runs/run"), weights(tmp_path / "runs/once"), rtol=0, atol=0)
    assert np.array_equal(*(numbers(tmp_path / "runs" / name, "train", "loss", "lr") for name in ("run", "once")))


def test_work_that_a_kill_has_lost_is_spent(budgeted, monkeypatch, tmp_path):
    """40 s and a checkpoint before the first kNN, at step 10: the second start has the other 60, from there on."""
    folder, clock = tmp_path / "runs/run", Clock()
    overrides = budgeted("budget=100s", "evaluate.knn_every_epochs=null", "checkpoint.every_seconds=1000")

    real = Run.read

    def killed(run, step, evaluation):
        if clock.now >= 40:
            run.progress.cost.write()
            raise Killed
        return real(run, step, evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "read", killed)
        # A killed process has no heartbeat left that would write after it.
        patch.setattr(CostMeter, "__enter__", lambda self: self)
        patch.setattr(CostMeter, "__exit__", lambda *_: None)
        with pytest.raises(Killed):
            spend(overrides, clock, patch)
    assert json.loads((folder / "spent.json").read_text())["seconds"] == 40
    # Dead for an hour.
    clock.now += 3600
    result = spend(overrides, clock, monkeypatch)
    resumed = next(line for line in lines(folder) if line["kind"] == "resume")
    assert resumed["step"] == 10
    # kNN is timed anew, for the checkpoint knows no price: 60 s less two evaluations.
    assert (result.step, clock.now) == (10 + 60 - 6, 3700)
    assert train_lines(folder)[10]["progress"] == pytest.approx(0.41)


def test_a_kill_in_the_last_evaluation_loses_no_step(budgeted, monkeypatch, tmp_path):
    """The budget has nothing left to train them again."""
    clock, overrides = Clock(), budgeted("budget=20s", "checkpoint.every_seconds=1000")

    def killed(checkup):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationSchedule, "measure_last", killed)
        with pytest.raises(Killed):
            spend(overrides, clock, patch)
    clock.now += 5
    result = spend(overrides, clock, monkeypatch)
    (resumed,) = (line["step"] for line in lines(tmp_path / "runs/run") if line["kind"] == "resume")
    assert resumed == result.step == 14


def test_a_finished_budget_says_so(budgeted, monkeypatch, capsys):
    overrides = budgeted("budget=20s")
    result = spend(overrides, Clock(), monkeypatch)
    capsys.readouterr()
    with opened(load_config("quickstart", overrides)) as (_, earlier):
        assert earlier == result
    assert f"is finished: step {result.step}" in capsys.readouterr().out


def test_progress_never_goes_back(tiny_config):
    """A longer evaluation than the one before leaves less room, a shorter one more."""
    clock = Clock()
    config, state = tiny_config("train.epochs=null", "budget=100s"), State()
    progress = Progress(config, 10, CostMeter(clock=clock), World(), state)
    found = []
    for now, cost in ((10, None), (20, 20.0), (22, 2.0), (40, 2.0)):
        clock.now, state.evaluation_cost = now, cost
        progress.agree()
        found.append(state.progress)
    assert found == pytest.approx([0.1, 20 / 80, 20 / 80, 40 / 98])


def test_checkpoints_keep_their_energy_back(tiny_config):
    """100 J a second: of 10 kJ two checkpoints of 5 s leave 9 kJ."""
    clock = Clock()
    config, cost = tiny_config("train.epochs=null", "budget=2.777778Wh"), CostMeter(energy=Meter(clock), clock=clock)
    progress = Progress(config, 10, cost, World())
    state = progress.state
    clock.now = 40
    progress.agree()
    assert state.progress == pytest.approx(0.4)
    with progress.saving():
        clock.now += 5
    progress.agree()
    assert state.progress == pytest.approx(4500 / 9000)
    # A checkpoint tells the next start.
    resumed = Progress(config, 10, cost, World(), State(**asdict(state)))
    resumed.state.progress = 0.0
    resumed.agree()
    assert resumed.state.progress == pytest.approx(4500 / 9000)


def test_the_price_of_a_checkpoint_is_known_with_that_of_the_first_evaluation(budgeted, monkeypatch):
    """2 s for each, of 100: one before the first kNN, at a tenth of the budget, and two around the last."""
    clock = Clock()
    monkeypatch.setattr(checkpoint, "save", taking(clock, 2, checkpoint.save))
    result = spend(budgeted("budget=100s", "checkpoint.every_seconds=1e9"), clock, monkeypatch)
    assert (result.status, clock.now) == ("done", 100)
    assert result.step == 100 - 3 * 2 - 2 * 3


def test_a_budget_within_a_long_epoch_tells_that_its_rate_was_held(budgeted, monkeypatch, capsys):
    held = ("optimizer.schedule=cosine_per_epoch", "optimizer.warmup=0")
    spend(budgeted("budget=240 images", *held), Clock(), monkeypatch)
    assert "learning rate" not in capsys.readouterr().out.partition("done ")[2]
    spend(budgeted("budget=200 images", *held, "run.name=b"), Clock(), monkeypatch)
    # 25 steps, the last epoch from step 20 on: (1 + cos(0.8 pi)) / 2.
    assert "rate      the run ended at 10 % of the full learning rate" in capsys.readouterr().out
    spend(budgeted("budget=200 images", "run.name=c"), Clock(), monkeypatch)
    assert "learning rate" not in capsys.readouterr().out.partition("done ")[2]


def test_images_end_at_their_step(budgeted, tmp_path):
    """250 images are 31 batches of 8, three epochs and a step."""
    assert main(["--config", "quickstart", *budgeted("budget=250 images", "data.val=null")]) == 0
    steps = train_lines(tmp_path / "runs/run")
    assert [line["progress"] for line in steps] == pytest.approx([(1 + i) / 31 for i in range(31)])


def spend_here(overrides):
    """On each rank, with clocks that run apart and GPUs that do not use the same."""
    world = gloo_world()
    clock = Clock(step=1.0 + 0.5 * world.rank)
    with pytest.MonkeyPatch.context() as patch:
        result = spend(overrides, clock, patch, world, Meter(clock, watts=30.0 + 20 * world.rank))
    return result, clock.now


def test_the_first_ranks_clock_holds_for_all(ranks, budgeted, tmp_path):
    results = ranks(2, spend_here, budgeted("budget=50s"))
    assert [result.step for result, _ in results] == [44, 44]
    # 44 steps and two evaluations.
    assert [now for _, now in results] == [50, 72]
    # 30 W for 50 s, 50 W for 72 s.
    assert lines(tmp_path / "runs/run")[-1]["kwh"] == pytest.approx((30 * 50 + 50 * 72) / 3.6e6)


def test_energy_is_that_of_all_ranks(ranks, budgeted):
    """30 J and 75 J a step, 90 and 150 a kNN: 3,600 J are 29.7 steps beside two of those."""
    results = ranks(2, spend_here, budgeted("budget=1Wh"))
    assert [result.step for result, _ in results] == [30, 30]


def test_a_share_of_the_steps_is_no_step_short(tiny_config):
    for hundredths in range(1, 101):
        train = tiny_config(f"train.max_share={hundredths / 100}").train
        assert [train.last_step(total) for total in (100, 1000)] == [hundredths, 10 * hundredths]
    # What is no whole number of steps ends before.
    assert tiny_config("train.max_share=0.37").train.last_step(20) == 7
