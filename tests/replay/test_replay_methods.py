"""Steps of methods whose loss reads averages of images, a queue or a target are replayed with these as they were."""

import pytest

from fastsiam.__main__ import main
from tests.support.runs import DRAWS, train_here
from tests.support.small_methods import run_overrides


@pytest.mark.slow
@pytest.mark.parametrize("name", ["average", "byol"])
def test_a_replayed_step_has_the_loss_of_the_run(tiny, tmp_path, capsys, name):
    """From the start, and in the second epoch, whose images have averages, from a checkpoint."""
    overrides = run_overrides(tiny, name, "train.epochs=2", "data.val=null")
    train_here(overrides, stop_after=14)
    train_here(overrides)
    for arguments, origin in ((["4", "--from-start"], "initial weights"), (["16"], "(step 14)")):
        capsys.readouterr()
        assert main(["replay", str(tmp_path / "runs/run"), "--step", *arguments]) == 0
        said = capsys.readouterr().out
        assert origin in said
        assert "logged    equal" in said
        # A network that follows has no gradient to tell of.
        assert "target" not in said.partition("gradient")[2].partition("\n")[0]


def test_a_replayed_step_drops_what_the_run_dropped(tiny, tmp_path, capsys):
    """An encoder with stochastic depth; the first step, and one after others."""
    train_here(tiny(*DRAWS, "train.max_steps=3", "data.val=null"))
    for step in ("1", "3"):
        capsys.readouterr()
        assert main(["replay", str(tmp_path / "runs/run"), "--step", step, "--from-start"]) == 0
        assert "logged    equal" in capsys.readouterr().out
