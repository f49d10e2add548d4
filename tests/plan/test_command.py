"""Measures tiny runs for real: numbers that fit each other, nothing left behind, mistakes answered by code."""

import json
import time

import pytest

from fastsiam.plan import __main__ as plan
from fastsiam.plan.__main__ import main
from tests.support.processes import MASKED, run_python, torchrun
from tests.support.refusals import printed_error


def planned(capsys, monkeypatch, *arguments):
    # This process has run other tests before.
    monkeypatch.setattr(plan, "process_began", time.monotonic)
    assert main(["--config", "quickstart", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_real_plan_is_consistent_and_leaves_nothing(tiny, tmp_path, demo_folder, capsys, monkeypatch):
    before = sorted(demo_folder.rglob("*"))
    found = planned(capsys, monkeypatch, "--minutes=0.05", "--budget=1min", *tiny("train.epochs=3"))
    assert sorted(demo_folder.rglob("*")) == before
    assert list(tmp_path.rglob("*")) == []
    rate = found["images_per_second"]["median"]
    assert (found["images"], found["val_images"], found["steps_per_epoch"]) == (80, 40, 10)
    assert found["epoch_seconds"] * rate == pytest.approx(80)
    run = found["run"]
    assert (run["steps"], run["epochs"], run["knn_times"], run["collapse_times"]) == (30, 3, 3, 2)
    assert run["train"] == pytest.approx(240 / rate)
    assert run["knn"] == pytest.approx(3 * found["knn_seconds"])
    parts = ("start", "compile", "train", "knn", "collapse", "saves")
    assert run["total"] == pytest.approx(sum(run[part] for part in parts))
    assert found["budget"]["total"] <= 60
    assert found["budget"]["steps"] > 30
    loaders = {loader["name"]: loader["images_per_second"] for loader in found["loaders"]}
    assert next(iter(loaders)) == "dali"
    assert all(loaders[name]["median"] > 0 for name in ("dali", "pil", "resident"))
    assert loaders["ffcv"] is None
    stages = found["seconds_per_image"]
    assert stages["communication"] is None
    assert stages["step"] == pytest.approx(1 / found["step_images_per_second"]["median"])
    assert all(0 < stages[name] < 1 for name in ("disk", "decoding", "augmentation"))
    assert [batch["batch_size"] for batch in found["batch_sizes"]] == [4, 8, 16, 32]
    assert (found["run"]["kwh"], found["run"]["cost"], found["joules_per_image"]) == (None, None, None)
    # The weights of the tiny model and its momentum, in bytes.
    assert 50_000 < found["checkpoint"]["bytes"] < 500_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "measured"),
    [
        (("data.backend=resident", "data.store_size=48"), {"decoding", "augmentation"}),
        (("data.backend=dali", "data.augment=dali"), {"disk", "decoding"}),
        (("data.backend=synthetic", "data.train=null", "data.val=null"), set()),
    ],
)
def test_stages_that_a_backend_does_not_have_are_not_measured(
    tiny, tmp_path, resident_cache, capsys, monkeypatch, overrides, measured
):
    found = planned(capsys, monkeypatch, "--minutes=0.02", *tiny(*overrides))
    stages = {name for name, seconds in found["seconds_per_image"].items() if seconds}
    assert stages == {"step", *measured}
    assert (found["knn_seconds"] is None) == ("data.val=null" in overrides)
    assert not resident_cache.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["data.trian=x"], "unknown-key"),
        (["--budget", "8"], "not-a-budget"),
        (["--budget", "5USD"], "no-price"),
        (["--minutes", "0"], "no-minutes"),
    ],
)
def test_mistakes_are_answered_while_torch_cannot_be_imported(arguments, code, tmp_path):
    program = MASKED.replace("fastsiam.train", "fastsiam.plan.__main__")
    done = run_python("-c", program, "--config", "quickstart", *arguments, f"run.dir={tmp_path}/runs")
    assert done.returncode == 2
    assert printed_error(done.stderr).code == code
    assert done.stderr.count("\n") == 1


def test_mistakes_of_the_data_are_one_sentence(tiny, capsys):
    assert main(["--config", "quickstart", *tiny("train.batch_size=100")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed_error(printed.err).key == "train.batch_size"


def test_ctrl_c_ends_it_with_one_line(tiny, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsiam.plan.measure.Bench", interrupt)
    assert main(["--config", "quickstart", *tiny()]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_first_rank_prints_for_two_that_average_gradients(tiny, tmp_path):
    arguments = ["--minutes", "0.02", "--json", *tiny("train.batch_size=16")]
    with torchrun(*arguments, module="fastsiam.plan") as job:
        printed, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    found = json.loads(printed)
    assert found["ranks"] == 2
    stages = found["seconds_per_image"]
    assert stages["communication"] > 0
    assert stages["step"] + stages["communication"] == pytest.approx(1 / found["step_images_per_second"]["median"])
    assert not (tmp_path / "runs").exists()
