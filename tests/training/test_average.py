"""The moving average of an encoder against a loop over its formula in fp64."""

import copy

import pytest
import torch
from torch import nn

from fastsiam.training.average import EncoderAverage
from tests.support.steps import build_step, views_of_step

EMA = ("train.batch_size=8", "evaluate.average=ema")


class Reference:
    """a_t = d a + (1 - d) w with d = min(decay, t / (t + 9)), number by number."""

    def __init__(self, encoder, decay):
        self.values, self.decay = self.of(encoder), decay

    @staticmethod
    def of(encoder):
        floats = {name: value for name, value in encoder.state_dict().items() if value.is_floating_point()}
        return {name: value.double().clone() for name, value in floats.items()}

    def update(self, encoder, step):
        kept = min(self.decay, step / (step + 9))
        for name, new in self.of(encoder).items():
            self.values[name] = kept * self.values[name] + (1 - kept) * new


@pytest.mark.parametrize("decay", [0.2, 0.999])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_steps_of_training_are_averaged_as_in_the_formula(tiny_config, dtype, tolerance, decay):
    """In bf16 as well, whose own numbers would not move by a thousandth."""
    step = build_step(tiny_config(*EMA, f"evaluate.average_decay={decay}"), dtype)
    reference = Reference(step.method.encoder, decay)
    for number in range(1, 7):
        step(views_of_step(number, 8, dtype=torch.float32 if dtype == torch.bfloat16 else dtype), number)
        reference.update(step.method.encoder, number)
    found = step.encoder.state_dict()
    newest = step.method.encoder.state_dict()
    for name, expected in reference.values.items():
        assert found[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found[name].double(), expected, atol=tolerance, rtol=0)
    assert (found["conv1.weight"] - newest["conv1.weight"]).abs().max() > 1e-4
    assert found["bn1.num_batches_tracked"] == newest["bn1.num_batches_tracked"] == 12
    assert not any(value.requires_grad for value in step.encoder.parameters())
    assert not step.encoder.training


def test_after_ten_steps_little_is_left_of_random_weights():
    encoder = nn.Linear(3, 3)
    nn.init.ones_(encoder.weight)
    average = EncoderAverage(encoder, 0.9999)
    nn.init.zeros_(encoder.weight)
    for step in range(1, 11):
        average.update(step)
    assert 0 < average.encoder.weight.max() < 2e-5


def test_a_skipped_step_leaves_the_average_and_others_move_it():
    encoder = nn.BatchNorm1d(4)
    average, reference = EncoderAverage(encoder, 0.9), EncoderAverage(encoder, 0.9)
    for step, overflowed in ((1, 0.0), (2, 1.0), (3, 0.0)):
        nn.init.constant_(encoder.weight, 5.0 * step)
        encoder.running_mean.add_(step)
        encoder.num_batches_tracked.add_(2)
        before = copy.deepcopy(average.encoder.state_dict())
        average.update(step, torch.full((1,), overflowed))
        if overflowed:
            after = average.encoder.state_dict()
            assert all(torch.equal(after[name], before[name]) for name in ("weight", "running_mean", "running_var"))
        else:
            reference.update(step)
    torch.testing.assert_close(average.encoder.state_dict(), reference.encoder.state_dict())


def test_training_is_the_same_with_and_without(tiny_config):
    states = []
    for overrides in (EMA, EMA[:1]):
        step = build_step(tiny_config(*overrides), torch.float32)
        for number in range(1, 4):
            step(views_of_step(number, 8, dtype=torch.float32), number)
        states.append(step.state_dict())
    torch.testing.assert_close(states[0]["method"], states[1]["method"], atol=0, rtol=0)
    assert (states[0]["average"] is None, states[1]["average"]) == (False, None)
