"""--dry-run: the config on stdout, what would run on stderr, the refusals of the run, and nothing written."""

import shutil

from filelock import FileLock

from fastsiam.config import load_config
from fastsiam.train import main
from tests.support.refusals import refused
from tests.support.runs import refused_unwritten


def test_dry_run_shows_what_would_run_and_writes_nothing(tiny, tmp_path, capsys):
    """`--dry-run > my.yaml` can be run; of what is refused there is no config."""
    overrides = tiny("optimizer.base_lr=0.64")
    assert main(["--config", "quickstart", "--dry-run", *overrides]) == 0
    config, said = capsys.readouterr()
    rate = "batch 8, learning rate 0.02 = 0.64 x 8 / 256"
    for part in (rate, "backend   dali", "2 epochs x 10 steps"):
        assert part in said
    fresh = f"{tmp_path}/demo"
    arguments = [f"data.train={fresh}/train", f"data.val={fresh}/val", "data.demo_seed=0"]
    assert main(["--config", "quickstart", "--dry-run", *arguments]) == 0
    said = capsys.readouterr().err
    assert "the demo images of seed 0 would be drawn" in said
    assert "x 62 steps" in said
    assert not list(tmp_path.iterdir())
    written = tmp_path / "my.yaml"
    written.write_text(config)
    assert load_config(written) == load_config("quickstart", overrides)


def test_a_dry_run_refuses_what_only_the_start_of_a_run_refuses(tiny, tmp_path, capsys, demo_folder):
    assert main(["--config", "quickstart", *tiny("train.epochs=1")]) == 0
    capsys.readouterr()
    overrides = tiny("train.epochs=1")

    def code(*more):
        return refused_unwritten(capsys, tmp_path, *overrides, *more).code

    with FileLock(tmp_path / "runs/run/lock"):
        assert code("train.epochs=2") == "run-locked"
    assert code(f"run.dir={demo_folder}/train/rings/00003.jpg/runs") == "run-folder-unwritable"
    unlabelled = tmp_path / "flat"
    shutil.copytree(demo_folder / "val/rings", unlabelled)
    assert code(f"data.val={unlabelled}", "run.name=other") == "no-labels"
    # What is finished is not refused, and would do nothing.
    assert main(["--config", "quickstart", "--dry-run", *overrides]) == 0
    assert "is finished" in capsys.readouterr().err


def test_a_dry_run_of_resident_decodes_nothing_and_refuses_what_does_not_fit(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overrides = tiny("data.backend=resident", "data.store_size=32")
    assert main(["--config", "quickstart", "--dry-run", *overrides]) == 0
    assert "resident (80 images of 32 px" in capsys.readouterr().err
    assert not (tmp_path / "cache/fastsiam/resident").exists()
    for more in ([], ["--dry-run"]):
        error = refused("train", "--config", "quickstart", *overrides, "data.store_size=200000", *more)
        assert (error.key, error.code) == ("data.store_size", "store-too-large")


def test_a_dry_run_of_what_begins_with_decoding_or_drawing_refuses_what_its_run_refuses(tiny, tmp_path, capsys):
    resident = tiny("data.backend=resident", "data.store_size=32", "train.epochs=1")
    undrawn = [f"data.train={tmp_path}/demo/train", f"data.val={tmp_path}/demo/val", "data.demo_seed=0"]
    undrawn += ["views.size=32", "train.views_grow_at=null"]
    for overrides in (resident, undrawn):
        for more, code in (
            (["train.epochs=null", "budget=1kWh"], "no-energy-counter"),
            (["train.epochs=null", "budget=3 images"], "budget-too-small"),
            (["optimizer.implementation=apex"], "apex-needs-cuda"),
        ):
            arguments = ["train", "--config", "quickstart", *overrides, f"run.dir={tmp_path}/new", *more, "--dry-run"]
            assert refused(*arguments).code == code
    assert not list(tmp_path.iterdir())
    assert main(["--config", "quickstart", *resident]) == 0
    capsys.readouterr()
    assert main(["--config", "quickstart", "--dry-run", *resident]) == 0
    assert "is finished" in capsys.readouterr().err
