"""The command that plans: what it measures for real, what it leaves behind, and how it answers mistakes."""

import json
import time

import pytest

from fastsiam.plan import __main__ as plan
from fastsiam.plan.__main__ import main
from tests.support.processes import MASKED, run_python, torchrun


def everything_under(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_real_plan_is_consistent_and_leaves_nothing(tiny, tmp_path, demo_folder, capsys, monkeypatch):
    # This process has run other tests before.
    monkeypatch.setattr(plan, "process_began", time.monotonic)
    before = everything_under(demo_folder)
    arguments = ["--config", "quickstart", "--minutes", "0.05", "--budget", "1min", "--json", *tiny("train.epochs=3")]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert everything_under(demo_folder) == before
    assert everything_under(tmp_path) == []
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
    loaders = {loader["name"]: loader for loader in found["loaders"]}
    assert next(iter(loaders)) == "dali"
    assert all(loaders[name]["images_per_second"]["median"] > 0 for name in ("dali", "pil", "resident"))
    assert loaders["ffcv"]["images_per_second"] is None
    stages = found["seconds_per_image"]
    assert stages["communication"] is None
    assert stages["step"] == pytest.approx(1 / found["step_images_per_second"]["median"])
    assert all(0 < stages[name] < 1 for name in ("disk", "decoding", "augmentation"))
    assert [batch["batch_size"] for batch in found["batch_sizes"]] == [4, 8, 16, 32]
    assert (found["run"]["kwh"], found["run"]["cost"], found["joules_per_image"]) == (None, None, None)
    # The weights of the tiny model and its momentum, in bytes.
    assert 50_000 < found["checkpoint"]["bytes"] < 500_000


@pytest.mark.parametrize(
    "overrides",
    [("data.backend=resident", "data.store_size=48"), ("data.backend=synthetic", "data.train=null", "data.val=null")],
)
def test_images_in_memory_and_no_images_are_planned_too(tiny, tmp_path, resident_cache, capsys, overrides):
    assert main(["--config", "quickstart", "--minutes", "0.02", "--json", *tiny(*overrides)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds_per_image"]["disk"] is None
    assert (found["knn_seconds"] is None) == ("data.val=null" in overrides)
    assert not resident_cache.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "quickstart", "data.trian=x"], "did you mean data.train?"),
        (["--config", "quickstart", "--budget", "8"], "--budget: '8' is not an amount with its unit; write 2h"),
        (["--config", "quickstart", "--budget", "5USD"], "budget_price_per_hour: null"),
        (["--config", "quickstart", "--minutes", "0"], "--minutes: 0 must be more than 0"),
    ],
)
def test_mistakes_are_answered_while_torch_cannot_be_imported(arguments, expected, tmp_path):
    program = MASKED.replace("fastsiam.train", "fastsiam.plan.__main__")
    done = run_python("-c", program, *arguments, f"run.dir={tmp_path}/runs")
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_mistakes_of_the_data_are_one_sentence(tiny, capsys):
    assert main(["--config", "quickstart", *tiny("train.batch_size=100")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fastsiam: train.batch_size: 100 is more than the 80 images under")


def test_ctrl_c_ends_it_with_one_line(tiny, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsiam.plan.measure.Bench", interrupt)
    assert main(["--config", "quickstart", *tiny()]) == 130
    assert capsys.readouterr().err == "fastsiam: stopped while measuring; nothing is predicted\n"


def test_the_first_rank_speaks_for_two_that_average_gradients(tiny, tmp_path):
    arguments = ["--minutes", "0.05", "--json", *tiny("train.batch_size=16")]
    with torchrun(*arguments, module="fastsiam.plan") as job:
        said, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    found = json.loads(said)
    assert found["ranks"] == 2
    stages = found["seconds_per_image"]
    assert stages["communication"] > 0
    assert stages["step"] + stages["communication"] == pytest.approx(1 / found["step_images_per_second"]["median"])
    assert not (tmp_path / "runs").exists()
