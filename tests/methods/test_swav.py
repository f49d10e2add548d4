"""SwAV's prototypes and queues."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.papers import TOLERANCE, trained_beside
from tests.support.small_methods import METHODS, indices_of, small_config, small_step, views_of

NAMES = [name for name in METHODS if name.startswith("swav")]


@pytest.mark.parametrize("name", NAMES)
def test_prototypes_and_queues_are_the_papers(name):
    """Newest first, in the order of the batch, of each view with codes; they join once full and due."""
    method, paper = trained_beside(small_config(name))
    torch.testing.assert_close(method.prototypes.weight, paper.prototypes, atol=TOLERANCE, rtol=0)
    queues = torch.stack([torch.stack(queue) for queue in paper.queues])
    torch.testing.assert_close(method.queue, queues, atol=TOLERANCE, rtol=0)
    assert method.queue_weight == 1


ONE_LARGE_VIEW = (
    "views=[{recipe: demo, size: 8, color: matrix, count: 1}, {recipe: demo, size: 4, color: matrix, count: 2}]"
)


@pytest.mark.parametrize("override", ["model.bn_statistics=per_view", "method.sinkhorn_iterations=1", ONE_LARGE_VIEW])
def test_other_statistics_iterations_and_views(override):
    trained_beside(small_config("swav", override))


def test_without_sinkhorn_codes_are_a_softmax():
    config = small_config("swav, two views", "method.sinkhorn_iterations=0")
    method = small_step(config).method
    out = method(views_of(config, 0))
    scores = [z @ method.prototypes.weight.T for z in out["z"].chunk(2)]
    codes = [F.softmax(s / method.epsilon, dim=1) for s in scores]
    logs = [F.log_softmax(s / method.temperature, dim=1) for s in scores]
    expected = -sum((codes[i] * logs[1 - i]).sum(1).mean() for i in (0, 1)) / 2
    assert out["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
    used = len(set(scores[0].argmax(1).tolist())) / 12
    assert out["used_prototypes"].item() == pytest.approx(used)


def test_prototypes_are_unit_vectors_before_each_forward_and_still_while_they_are_frozen():
    """With momentum and decay, which move parameters without a gradient's help, and LARS."""
    for optimizer in ("sgd", "lars"):
        config = small_config("swav", "method.freeze_prototypes=0.5", f"optimizer.name={optimizer}", "method.queue=0",
                              "method.queue_from=0.075")  # fmt: skip
        assert config.optimizer.weight_decay > 0
        step = small_step(config, torch.float32)
        weight = step.method.prototypes.weight
        assert step.method.prototypes.bias is None
        first, moved = weight.clone(), []
        for number in range(10):
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(12), atol=1e-6, rtol=0)
            step(views_of(config, number, torch.float32), number + 1, indices_of(config, number), number / 10)
            moved.append(not torch.equal(weight, first))
        assert moved == [False] * 5 + [True] * 5
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(12), atol=1e-6, rtol=0)


def test_a_queue_that_is_not_full_or_not_due_changes_no_codes():
    with_queue, without = small_config("swav"), small_config("swav", "method.queue=0", "method.queue_from=0.075")
    steps = [small_step(config) for config in (with_queue, without)]
    # It holds 20 rows: full after three steps of 8, and due from 0.3.
    for progresses, same in (([0, 0.1, 0.1, 0.1, 0.1], True), ([0.4], False)):
        for number, progress in enumerate(progresses):
            losses = [step(views_of(with_queue, number), number + 1, None, progress)["loss"].item() for step in steps]
            assert (abs(losses[0] - losses[1]) < 1e-12) == same
    late = small_step(with_queue)
    used = []
    for number in range(4):
        late(views_of(with_queue, number), number + 1, None, 0.5)
        used.append(late.method.queue_weight.item())
    assert used == [0, 0, 0, 1]


def test_a_queue_smaller_than_a_batch_has_its_first_images():
    config = small_config("swav, two views", "method.queue=5")
    step = small_step(config)
    out = step(views_of(config, 0), 1, None, 0.5)
    torch.testing.assert_close(step.method.queue, out["z"].unflatten(0, (2, -1))[:, :5], atol=0, rtol=0)
    assert step(views_of(config, 1), 2, None, 0.5)["loss"].isfinite()


def test_the_loss_of_a_collapse_is_that_of_equal_scores():
    method = small_step(small_config("swav")).method
    with torch.no_grad():
        method.prototypes.weight[:] = method.prototypes.weight[:1]
    assert method(views_of(small_config("swav"), 0))["loss"].item() == pytest.approx(math.log(12), rel=1e-6)
