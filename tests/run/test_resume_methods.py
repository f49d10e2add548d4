"""A run of any method that is killed twice ends as an undisturbed one, with its targets, queues and averages."""

import pytest
import torch

from fastsiam.methods.byol import BYOL
from fastsiam.run.encoder_file import load_encoder
from tests.support.runs import assert_kills_change_nothing, refused_unwritten, train_here
from tests.support.small_methods import CLASSES, run_overrides


@pytest.fixture
def small(tiny):
    return lambda name, *more: run_overrides(tiny, name, "train.epochs=1", "data.val=null", *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "simsiam"])
def test_killed_twice_it_ends_as_an_undisturbed_run(name, small, tmp_path):
    """Bit by bit, after the buffers have moved: the queue of SwAV is in use, BYOL's momentum has risen."""
    assert_kills_change_nothing(small(name), tmp_path / "runs", (5, 9))
    saved = torch.load(tmp_path / "runs/whole/checkpoint.pt", weights_only=True)["method"]
    held = {"byol": "target.encoder.conv1.weight", "alternating": "held.encoder.conv1.weight", "average": "eta",
            "moco": "queue", "swav": "queue", "simclr": "encoder.conv1.weight"}  # fmt: skip
    assert saved[held[name]].abs().max() > 0


def test_a_run_begins_with_target_and_encoder_of_the_weights_that_are_given(small, tmp_path, monkeypatch):
    train_here(small("byol", "train.max_steps=1", "train.seed=1", "run.name=first"))
    begun = []
    real = BYOL.before_step

    def spy(self, progress, indices=None):
        begun.append([network.conv1.weight.clone() for network in (self.encoder, self.target.encoder)])
        real(self, progress, indices)

    monkeypatch.setattr(BYOL, "before_step", spy)
    train_here(small("byol", "train.max_steps=1", f"model.weights={tmp_path}/runs/first", "run.name=second"))
    given = load_encoder(tmp_path / "runs/first").conv1.weight
    assert all(torch.equal(weight, given) for weight in begun[0])


def test_averages_of_another_number_of_images_are_refused(small, tmp_path, capsys):
    error = refused_unwritten(capsys, tmp_path, *small("average", "method.images=79"))
    assert (error.key, error.code) == ("method.images", "other-number-of-images")
    assert str(error).endswith("set method.images=80")
