"""Schedules against their formulas, parameter groups, and the optimizer against the definition of its step."""

import math
import re

import pytest
import torch

from fastsiam.config import CONFIGS, load_config
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer, large_batch_warning, scale_at, set_learning_rate


def small(*overrides):
    return load_config("quickstart", ["model.width=8", "optimizer.base_lr=0.4", "train.batch_size=128", *overrides])


def train_steps(optimizer, method, gradients, scaler=None):
    """The weights after a step with each of `gradients`, the value of all entries of the gradient."""
    for gradient in gradients:
        for parameter in method.parameters():
            parameter.grad = torch.full_like(parameter, gradient) * torch.linspace(1, 2, parameter.shape[-1])
        if scaler:
            # As the backward of a scaled loss leaves them.
            for parameter in method.parameters():
                parameter.grad *= scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return [parameter.detach().clone() for parameter in method.parameters()]


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_first_step_that_overflows_leaves_no_trace_in_the_momentum(name, loads):
    """Memory that nobody has written is NaN here, and steps after the skipped one are those of a run without it.

    `loads`: the state of a checkpoint that was written before the first step.
    """
    found = []
    for gradients, scaler in (((math.inf, 0.1, -0.2), torch.amp.GradScaler("cpu")), ((0.1, -0.2), None)):
        torch.manual_seed(0)
        config = small(f"optimizer.name={name}", *(["train.precision=fp16"] if scaler else []))
        method = build_method(config)
        optimizer = build_optimizer(method, config)
        if loads:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {}})
        torch.use_deterministic_algorithms(True)
        try:
            found.append(train_steps(optimizer, method, gradients, scaler))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(weight.isfinite().all() for weight in found[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_from_zero_is_torchs_sgd_to_the_bit(momentum):
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        config = small(f"optimizer.momentum={momentum}")
        method = build_method(config)
        optimizer = build_optimizer(method, config)
        if not ours:
            decay = config.optimizer.weight_decay
            optimizer = torch.optim.SGD(method.parameters(), 0.2, momentum, weight_decay=decay, fused=True)
        found.append(train_steps(optimizer, method, (0.1, -0.2, 0.3)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("epochs", [1, 3, 7, 49, 100, 800, 999])
@pytest.mark.parametrize("steps_per_epoch", [1, 3, 62])
def test_cosine_per_epoch_is_the_authors_formula_at_every_step(epochs, steps_per_epoch):
    """lr * 0.5 * (1 + cos(pi * epoch / epochs)), held within an epoch."""
    total = epochs * steps_per_epoch
    for step in range(total):
        epoch = step // steps_per_epoch
        expected = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        began = epoch * steps_per_epoch / total
        assert scale_at(step / total, "cosine_per_epoch", 0.0, began) == pytest.approx(expected, abs=1e-12)


def test_cosine_per_epoch_spans_what_the_warmup_leaves():
    """A tenth of ten epochs of warmup, then the half cosine over the other nine, a value an epoch."""
    steps = [scale_at(step / 40, "cosine_per_epoch", 0.1, step // 4 / 10) for step in range(40)]
    assert steps[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    held = [0.5 * (1 + math.cos(math.pi * epoch / 9)) for epoch in range(9) for _ in range(4)]
    assert steps[4:] == pytest.approx(held)
    # A warmup that ends inside an epoch leaves the rate at its top until the next one.
    assert scale_at(0.16, "cosine_per_epoch", 0.15, 0.1) == 1


def test_cosine_and_constant_after_warmup():
    assert scale_at(0, "cosine", 0.1) == 0
    assert scale_at(0.05, "cosine", 0.1) == pytest.approx(0.5)
    assert scale_at(0.1, "cosine", 0.1) == 1
    assert scale_at(0.55, "cosine", 0.1) == pytest.approx(0.5)
    assert scale_at(1, "cosine", 0.1) == pytest.approx(0)
    assert scale_at(0.5, "cosine", 0.0) == pytest.approx(0.5)
    assert scale_at(0.99, "constant", 0.1) == 1
    assert scale_at(0.02, "constant", 0.1) == pytest.approx(0.2)


def test_the_predictor_keeps_its_rate_where_it_is_fixed():
    config = small("optimizer.predictor_lr=fixed", "optimizer.warmup=0")
    method = build_method(config)
    optimizer = build_optimizer(method, config)
    held = {id(p) for group in optimizer.param_groups if not group["scheduled"] for p in group["params"]}
    assert held == {id(p) for p in method.predictor.parameters()}
    for progress, scale in ((0, 1), (0.5, 0.5), (1, 0)):
        assert set_learning_rate(optimizer, config, progress) == pytest.approx(0.2 * scale)
        rates = {group["scheduled"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {True: pytest.approx(0.2 * scale), False: pytest.approx(0.2)}


def test_a_fixed_predictor_warms_up_with_the_rest():
    """Without it the predictor learns a constant at full rate before z has any shape."""
    config = small("optimizer.predictor_lr=fixed", "optimizer.warmup=0.1")
    optimizer = build_optimizer(build_method(config), config)
    for progress, held in ((0, 0), (0.05, 0.1), (0.1, 0.2), (0.9, 0.2)):
        set_learning_rate(optimizer, config, progress)
        rates = {group["scheduled"]: group["lr"] for group in optimizer.param_groups}
        assert rates[False] == pytest.approx(held)


@pytest.mark.parametrize("predictor", ["fixed", "scheduled"])
def test_every_parameter_is_decayed_and_trained_once(predictor):
    config = small(f"optimizer.predictor_lr={predictor}")
    method = build_method(config)
    optimizer = build_optimizer(method, config)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in method.parameters())
    assert {group["scheduled"] for group in optimizer.param_groups} == {True, predictor == "scheduled"}


@pytest.mark.parametrize(
    ("batch_size", "more", "advice"),
    [
        (1023, [], []),
        (1024, [], ["optimizer.warmup=0.1"]),
        (1024, ["optimizer.warmup=0.1"], []),
        (1025, ["optimizer.warmup=0.1"], ["optimizer.name=lars"]),
        (4096, [], ["optimizer.name=lars", "optimizer.warmup=0.1"]),
        (4096, ["optimizer.name=lars", "train.epochs=800"], ["optimizer.warmup=0.0125"]),
        (4096, ["optimizer.name=lars", "optimizer.warmup=0.1"], []),
    ],
)
def test_large_batches_are_warned_of_with_what_to_set(batch_size, more, advice):
    notice = large_batch_warning(load_config("r50_100ep", [f"train.batch_size={batch_size}", *more]))
    assert (notice and notice.code) == ("large-batch" if advice else None)
    assert re.findall(r"optimizer\.\w+=[\w.]*\w", notice or "") == advice


def test_no_shipped_recipe_is_warned_of():
    assert {large_batch_warning(load_config(path)) for path in CONFIGS.glob("*.yaml")} == {None}
