"""Heads of a linear sweep against loops over apex's LARC, torch's SGD and autograd, head by head."""

import pytest
import torch
import torch.nn.functional as F

from fastsiam.evaluate import linear
from fastsiam.evaluate.linear import LinearHeads
from tests.support.gloo_ranks import world

DIM, CLASSES = 12, 5
RULES = ([1.6, 0.3, 5.0], [0.0, 1e-3, 0.1])


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return centres[labels] + torch.randn(count, DIM, generator=generator), labels


class Loop:
    """One classifier in torch, trained with autograd; `larc` is apex's LARC(trust 0.001, clip=False) in words."""

    def __init__(self, heads, number, rate, decay, optimizer, dtype=torch.float64):
        self.layer = torch.nn.Linear(DIM, CLASSES, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(heads.weight[number])
            self.layer.bias.copy_(heads.bias[number])
        self.larc, self.decay = optimizer == "lars", decay
        self.sgd = torch.optim.SGD(self.layer.parameters(), rate, 0.9, weight_decay=0.0 if self.larc else decay)

    def step(self, features, labels, scale):
        self.sgd.zero_grad()
        F.cross_entropy(self.layer(features.to(self.layer.weight.dtype)), labels).backward()
        for parameter in self.layer.parameters() if self.larc else ():
            w, g = parameter.data.norm(), parameter.grad.norm()
            if w != 0 and g != 0:
                ratio = 0.001 * w / (g + w * self.decay + 1e-8)
                parameter.grad = (parameter.grad + self.decay * parameter.data) * ratio
        rate = self.sgd.param_groups[0]["lr"]
        self.sgd.param_groups[0]["lr"] = rate * scale
        self.sgd.step()
        self.sgd.param_groups[0]["lr"] = rate


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_heads_trained_at_once_are_those_trained_apart(optimizer):
    # LARC moves a tensor by a thousandth of its norm at most.
    rules = [rate * (100 if optimizer == "lars" else 1) for rate in RULES[0]], RULES[1]
    heads = LinearHeads(DIM, CLASSES, *rules, optimizer)
    loops = [Loop(heads, number, *rule, optimizer) for number, rule in enumerate(zip(*rules, strict=True))]
    for step in range(30):
        features, labels = data(24, step)
        heads.step(features, labels, 1 / (1 + step))
        for loop in loops:
            loop.step(features, labels, 1 / (1 + step))
    for number, loop in enumerate(loops):
        torch.testing.assert_close(heads.weight[number].double(), loop.layer.weight.data, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(heads.bias[number].double(), loop.layer.bias.data, rtol=1e-5, atol=1e-5)
    assert (heads.weight[0] - heads.weight[1]).norm() > 0.1


def test_the_authors_preset_is_larc_over_a_hundred_steps_bias_included():
    heads = LinearHeads(DIM, CLASSES, [1.6], [0.0], "lars")
    loop, first = Loop(heads, 0, 1.6, 0.0, "lars"), heads.weight[0].clone()
    features, labels = data(24, 0)
    heads.step(features, labels)
    # The bias, which begins at zero, takes its gradient as it is: 1.6 times that of zeros.
    gradient = F.softmax(features @ loop.layer.weight.data.float().T, 1) - F.one_hot(labels, CLASSES)
    torch.testing.assert_close(heads.bias[0], -1.6 * gradient.mean(0), rtol=1e-4, atol=1e-6)
    loop.step(features, labels, 1)
    for step in range(1, 100):
        features, labels = data(24, step)
        heads.step(features, labels, 0.99**step)
        loop.step(features, labels, 0.99**step)
    torch.testing.assert_close(heads.weight[0].double(), loop.layer.weight.data, rtol=0, atol=1e-6)
    torch.testing.assert_close(heads.bias[0].double(), loop.layer.bias.data, rtol=0, atol=1e-6)
    assert (heads.weight[0] - first).norm() > 0.1 * first.norm()


def test_heads_begin_as_in_the_authors_code_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    heads = LinearHeads(400, 100, [1.0, 2.0], [0.0, 0.0], "sgd")
    assert torch.equal(torch.get_rng_state(), before)
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(heads.weight[0], heads.weight[1])
    assert not heads.bias.any()
    other = LinearHeads(400, 100, [1.0], [0.0], "sgd", seed=1)
    assert not torch.equal(other.weight[0], heads.weight[0])


def test_an_image_without_a_label_does_not_count():
    features, labels = data(20, 0)
    masked, alone = (LinearHeads(DIM, CLASSES, *RULES, "lars") for _ in range(2))
    for _ in range(3):
        masked.step(torch.cat((features, features[:7] * 50)), torch.cat((labels, torch.full((7,), -1))))
        alone.step(features, labels)
    torch.testing.assert_close(masked.weight, alone.weight, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(masked.take_tally(), alone.take_tally(), strict=True):
        assert ours == pytest.approx(theirs)
    before = alone.state_dict()["weight"].clone()
    alone.step(features, torch.full_like(labels, -1))
    assert torch.isfinite(alone.weight).all()
    assert not torch.equal(alone.weight, before)  # its momentum goes on


def test_the_tally_is_loss_and_accuracy_before_each_step():
    heads = LinearHeads(DIM, CLASSES, [2.0], [0.0], "sgd")
    losses, right = [], []
    for step in range(4):
        features, labels = data(10, step)
        logits = features @ heads.weight[0].T + heads.bias[0]
        losses.append(F.cross_entropy(logits, labels).item())
        right.append((logits.argmax(1) == labels).float().mean().item())
        heads.step(features, labels)
    (loss,), (top1,), images = heads.take_tally()
    assert (loss, top1, images) == (pytest.approx(sum(losses) / 4), pytest.approx(25 * sum(right)), 40)
    assert heads.take_tally()[2] == 0


def test_accuracy_is_micro_averaged_and_a_head_that_has_diverged_is_not_right(monkeypatch):
    """Four images of one class and one of another: a mean over classes would give 50 %."""
    heads = LinearHeads(2, 6, [1.0, 1.0], [0.0, 0.0], "sgd")
    heads.weight.zero_()
    heads.bias[0] = torch.tensor([6.0, 5, 4, 3, 2, 1])
    heads.weight[1] = torch.nan
    features, labels = torch.ones(5, 2), torch.tensor([0, 0, 0, 0, 5])
    monkeypatch.setattr(linear, "CHUNK", 2)
    top1, top5 = heads.accuracy(features, labels, top=(1, 5))
    assert (top1[0], top5[0]) == (80, 80)
    assert top1[1] < 100
    assert heads.accuracy(features, torch.tensor([4, 4, 4, 4, 5]), top=(5,))[0][0] == 80


def test_its_state_goes_on_exactly():
    whole = LinearHeads(DIM, CLASSES, *RULES, "lars")
    for step in range(6):
        if step == 3:
            state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        whole.step(*data(16, step))
    later = LinearHeads(DIM, CLASSES, *RULES, "lars", seed=7)
    later.load_state_dict(state)
    for step in range(3, 6):
        later.step(*data(16, step))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(later.state_dict()[name], tensor), name


def of_this_rank(steps):
    """Rank 0 has fewer rows than rank 1, some of which have no label."""
    heads = LinearHeads(DIM, CLASSES, *RULES, "lars", world=world())
    mine = (slice(0, 5), slice(5, None))[world().rank]
    for step in range(steps):
        features, labels = data(16, step)
        labels[6] = -1
        heads.step(features[mine], labels[mine])
    features, labels = data(30, 50)
    accuracy = heads.accuracy(features[mine], labels[mine])
    return heads.weight, heads.bias, heads.take_tally(), accuracy


@pytest.mark.slow
def test_two_ranks_are_one(ranks):
    alone = LinearHeads(DIM, CLASSES, *RULES, "lars")
    for step in range(5):
        features, labels = data(16, step)
        labels[6] = -1
        alone.step(features, labels)
    expected = alone.weight, alone.bias, alone.take_tally(), alone.accuracy(*data(30, 50))
    for weight, bias, tally, accuracy in ranks(2, of_this_rank, 5):
        torch.testing.assert_close((weight, bias), expected[:2], rtol=1e-5, atol=1e-6)
        assert tally[0] == pytest.approx(expected[2][0], rel=1e-5)
        assert (tally[1:], accuracy) == (expected[2][1:], expected[3])
