"""Every method against its paper in float64, in half precision, and in micro batches."""

import numpy as np
import pytest
import torch

from fastsiam.training.micro_batch import micro_batch_of
from tests.support import papers
from tests.support.small_methods import CLASSES, METHODS, indices_of, small_config, small_step, views_of

FOLLOWERS = {"byol": "target", "moco": "key", "alternating": "held"}


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith(("byol", "moco", "swav", "average"))])
def test_training_steps_are_the_papers(name):
    """Losses, weights and running statistics of five steps of SGD: a loss of twice the size has other weights.

    The files of the other methods compare their buffers too.
    """
    papers.trained_beside(small_config(name))


@pytest.mark.parametrize(
    "override",
    [
        "method.predictor=null",
        "method.predictor.frozen=true",
        "method.predictor.norm=all",
        "method.predictor.norm=none",
        "method.projector.norm=all",
        "method.projector.norm=none",
    ],
)
def test_heads_of_every_kind_train_as_the_papers(override):
    method, _ = papers.trained_beside(small_config("byol", override))
    is_fixed = override in ("method.predictor=null", "method.predictor.frozen=true")
    assert any(parameter.requires_grad for parameter in method.predictor.parameters()) != is_fixed
    layers = [type(layer).__name__ for layer in (*method.projector, *method.predictor.children())]
    norms = sum("BatchNorm" in layer for layer in layers)
    expected = {"predictor=null": 1, "predictor.frozen=true": 2, "predictor.norm=all": 3, "predictor.norm=none": 1}
    expected |= {"projector.norm=all": 3, "projector.norm=none": 1}
    assert norms == expected[override.removeprefix("method.")]


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_network_that_follows_learns_nothing_by_itself(name):
    config = small_config(name)
    step = small_step(config)
    follower = getattr(step.method, FOLLOWERS[name])
    inside = {id(parameter) for parameter in follower.parameters()}
    assert not inside & {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    norms = [module for module in follower.modules() if "BatchNorm" in type(module).__name__]
    own = [module for module in step.method.encoder.modules() if "BatchNorm" in type(module).__name__]
    for number in range(4):
        step(views_of(config, number), number + 1, indices_of(config, number), number / 4)
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in follower.parameters())
        assert norms
        assert all(module.training for module in norms)
    # One batch for each view that it sees, by its own weights.
    assert norms[0].num_batches_tracked.item() == 4 * (1 if name == "moco" else 2)
    assert (norms[0].running_mean - own[0].running_mean).abs().max() > 1e-3


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_network_that_follows_begins_with_the_weights_that_are_given(name):
    """model.weights; without them the target of the first steps would be a random network."""
    config = small_config(name)
    method = small_step(config).method
    follower = getattr(method, FOLLOWERS[name])
    with torch.no_grad():
        for value in method.encoder.state_dict().values():
            value.add_(1)
    method.after_loading()
    torch.testing.assert_close(follower.encoder.state_dict(), method.encoder.state_dict(), atol=0, rtol=0)
    assert all(not parameter.requires_grad for parameter in follower.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_in_bf16_it_trains_near_fp32(name):
    """No NaN, buffers in fp32, and the loss of fp32 as far as 8 bits go."""
    config = small_config(name, "optimizer.base_lr=0.3")
    wide, half = (small_step(config, dtype) for dtype in (torch.float32, torch.bfloat16))
    for number in range(6):
        indices, progress = indices_of(config, number), number / 6
        found = half(views_of(config, number, torch.bfloat16), number + 1, indices, progress)
        expected = wide(views_of(config, number, torch.float32), number + 1, indices, progress)
        assert found["loss"].dtype == torch.float32
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.05, abs=0.1)
    state = half.method.state_dict()
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "average"])
def test_micro_batches_are_the_mean_of_their_losses_and_one_step_of_buffers(name):
    config = small_config(name, "train.micro_batch=4")
    step, alone = small_step(config), small_step(small_config(name))
    for number in range(3):
        views, progress = views_of(config, number), number / 3
        before = {key: value.clone() for key, value in step.method.state_dict().items()}
        out = step(views, number + 1, indices_of(config, number), progress)
        alone.method.load_state_dict(before)
        alone.method.before_step(progress, indices_of(config, number))
        losses = [alone.method(micro_batch_of(views, part, 2))["loss"].item() for part in range(2)]
        assert out["loss"].item() == pytest.approx(np.mean(losses), abs=1e-12)
    rows = {"moco": 8, "moco, symmetric": 16}.get(name, 8 * sum(group.count for group in config.view_groups))
    assert len(out["z"]) == rows


@pytest.mark.parametrize("name", ["moco", "moco, symmetric", "swav"])
def test_a_queue_has_the_rows_of_micro_batches_in_the_order_of_the_batch(name):
    """Of networks without batch norm, with which micro batches give the rows of the whole batch."""
    queues = []
    for cut in ((), ("train.micro_batch=2",)):
        config = small_config(name, *cut, "method.projector.norm=none")
        step = small_step(config)
        for norms in [step.method.encoder, *([step.method.key.encoder] if "moco" in name else [])]:
            norms[1] = torch.nn.Identity()
        # The same weights after another order of sums: this is one step.
        step(views_of(config, 0), 1, indices_of(config, 0), 0.0)
        queues.append(step.method.queue.clone())
    torch.testing.assert_close(*queues, atol=1e-12, rtol=0)
    assert (queues[0].flatten(0, -2)[:8].diff(dim=0).abs().sum(1) > 1e-3).all()
