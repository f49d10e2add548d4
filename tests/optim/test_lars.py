"""LARS against twenty lines written from the paper and from apex's LARC, its groups, its scaler and its resume."""

import io

import pytest
import torch

import fastsiam
from fastsiam.config import load_config
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer, set_learning_rate
from fastsiam.optim.lars import LARS, trust_ratios
from tests.support.runs import numbers, weights

SHAPES = ((6, 4), (8, 3, 3, 3), (8,))
RATES = {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.02, "trust": 0.05}


class ReferenceLARC:
    """apex.parallel.LARC(clip=False) around torch.optim.SGD, in float64."""

    def __init__(self, weights, lr, momentum, weight_decay, trust):
        self.weights = [weight.detach().double().clone().requires_grad_() for weight in weights]
        self.sgd = torch.optim.SGD(self.weights, lr=lr, momentum=momentum)
        self.weight_decay, self.trust = weight_decay, trust

    def step(self, gradients):
        for weight, gradient in zip(self.weights, gradients, strict=True):
            gradient = gradient.double()
            w, g = weight.detach().norm(), gradient.norm()
            if w != 0 and g != 0:
                local = self.trust * w / (g + self.weight_decay * w + 1e-8)
                gradient = (gradient + self.weight_decay * weight.detach()) * local
            weight.grad = gradient
        self.sgd.step()


def random_tensors(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def parameters(values, memory_format=torch.contiguous_format):
    """Parameters in a memory format where it fits them."""
    formats = [memory_format if value.ndim == 4 else torch.contiguous_format for value in values]
    return [
        torch.nn.Parameter(value.clone().contiguous(memory_format=f)) for value, f in zip(values, formats, strict=True)
    ]


def give(params, gradients):
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ten_steps_are_those_of_larc_around_sgd(memory_format):
    start = random_tensors(0)
    ours, theirs = parameters(start, memory_format), ReferenceLARC(start, **RATES)
    optimizer = LARS(ours, **RATES)
    for number in range(1, 11):
        # Gradients of very different sizes: the ratio takes their norm out.
        gradients = [10.0**number * gradient for gradient in random_tensors(number)]
        give(ours, gradients)
        optimizer.step()
        theirs.step(gradients)
    for weight, expected, before in zip(ours, theirs.weights, start, strict=True):
        torch.testing.assert_close(weight.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert (weight.detach() - before).norm() > 0.1 * before.norm()
        assert optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()


def test_the_first_step_by_hand():
    """w = (3, 4), g = (0.6, 0.8), wd = 0.1: g' = (0.9, 1.2) 0.2 5 / (1 + 0.5), and w - 0.5 g'."""
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.6, 0.8]])
    LARS([weight], lr=0.5, weight_decay=0.1, trust=0.2).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.7, 3.6]]))


def test_where_a_norm_is_zero_it_is_larc_too():
    """A weight of zeros moves by lr g, and without a gradient nothing decays; momentum runs on in both."""
    start = [torch.zeros(2, 3), *random_tensors(1, [(2, 3)]), *random_tensors(2, [(3, 2)])]
    ours, theirs = parameters(start), ReferenceLARC(start, **RATES)
    optimizer = LARS(ours, **RATES)
    gradients = random_tensors(3, [(2, 3), (2, 3), (3, 2)])
    for zeros in ((1,), (1,), (), (2,)):
        now = [torch.zeros_like(g) if number in zeros else g for number, g in enumerate(gradients)]
        give(ours, now)
        optimizer.step()
        theirs.step(now)
        if zeros == (1,):
            assert torch.equal(ours[1].detach(), start[1])
    for weight, expected in zip(ours, theirs.weights, strict=True):
        torch.testing.assert_close(weight.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    ratios = trust_ratios(start, gradients, 0.02, 0.05, 1e-8)
    assert ratios[0] == 1
    assert ratios[1] == pytest.approx(
        0.05 * start[1].norm().item() / (gradients[1].norm() + 0.02 * start[1].norm()).item()
    )


def test_a_parameter_without_a_gradient_stays():
    one, other = parameters(random_tensors(0, [(2, 3), (2, 3)]))
    before = other.detach().clone()
    one.grad = torch.ones(2, 3)
    optimizer = LARS([one, other], **RATES)
    optimizer.step()
    assert torch.equal(other.detach(), before)
    assert other not in optimizer.state


def config(*overrides):
    return load_config("quickstart", ["model.width=8", "optimizer.name=lars", "optimizer.warmup=0", *overrides])


@pytest.mark.parametrize("predictor", ["fixed", "scheduled"])
def test_groups_split_by_schedule_and_by_dimension(predictor):
    settings = config(
        f"optimizer.predictor_lr={predictor}", "optimizer.weight_decay=1e-6", "optimizer.lars_trust=0.002"
    )
    method = build_method(settings)
    optimizer = build_optimizer(method, settings)
    assert isinstance(optimizer, LARS)
    held = {id(p) for p in method.predictor.parameters()} if predictor == "fixed" else set()
    seen = []
    for group in optimizer.param_groups:
        seen += [id(p) for p in group["params"]]
        assert {p.ndim > 1 for p in group["params"]} == {group["adapt"]}
        assert {id(p) in held for p in group["params"]} == {not group["scheduled"]}
        assert group["weight_decay"] == (1e-6 if group["adapt"] else 0)
        assert (group["trust"], group["momentum"]) == (0.002, 0.9)
    assert sorted(seen) == sorted(id(p) for p in method.parameters())
    assert len(optimizer.param_groups) == (4 if predictor == "fixed" else 2)
    rate = set_learning_rate(optimizer, settings, 0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(rate if group["scheduled"] else 2 * rate)


def test_vectors_take_plain_sgd_without_decay():
    settings = config("optimizer.weight_decay=0.1", "optimizer.predictor_lr=scheduled")
    method = torch.nn.Linear(3, 2)
    before, bias = method.weight.detach().clone(), method.bias.detach().clone()
    method.constant_lr_parameters = list
    optimizer = build_optimizer(method, settings)
    method.weight.grad, method.bias.grad = torch.ones(2, 3), torch.tensor([0.5, -1.0])
    optimizer.step()
    optimizer.step()
    # v = g, then 1.9 g.
    torch.testing.assert_close(method.bias.detach(), bias - settings.learning_rate * 2.9 * method.bias.grad)
    moved = (method.weight.detach() - before).norm() / before.norm()
    assert 0 < moved <= 2.9 * 0.001 * settings.learning_rate * (1 + 1e-3)


def scaled_step(scaler, optimizer, params, gradients):
    """One step with the gradients that a loss scaled by `scaler` would have left."""
    scaler.scale(torch.zeros(()))
    give(params, [gradient * scaler.get_scale() for gradient in gradients])
    scaler.step(optimizer)
    scaler.update()


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def snapshot(optimizer):
    return [
        (parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone())
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def test_with_a_grad_scaler_steps_are_those_without():
    start, steps = random_tensors(0), [random_tensors(seed) for seed in (1, 2, 3)]
    plain, scaled = parameters(start), parameters(start)
    one, other = LARS(plain, **RATES), LARS(scaled, **RATES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for gradients in steps:
        give(plain, gradients)
        one.step()
        scaled_step(scaler, other, scaled, gradients)
    assert_same(snapshot(other), snapshot(one))
    # Scaled gradients are left scaled, and what the scaler handed over is gone.
    torch.testing.assert_close(scaled[0].grad, steps[-1][0] * 2.0**16)
    assert not hasattr(other, "grad_scale")


def test_gradients_that_the_caller_unscaled_are_not_scaled_again():
    """As for clipping: scaler.unscale_ before scaler.step."""
    start, gradients = random_tensors(0), random_tensors(1)
    plain, scaled = parameters(start), parameters(start)
    one, other = LARS(plain, **RATES), LARS(scaled, **RATES)
    give(plain, gradients)
    one.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    give(scaled, [gradient * 2.0**10 for gradient in gradients])
    scaler.unscale_(other)
    scaler.step(other)
    assert_same(snapshot(other), snapshot(one))


def test_an_overflow_changes_nothing_but_the_scale():
    params = parameters(random_tensors(0))
    optimizer = LARS(params, **RATES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled_step(scaler, optimizer, params, random_tensors(1))
    before = snapshot(optimizer)
    overflowed = random_tensors(2)
    overflowed[1][0, 0, 0, 0] = torch.inf
    scaled_step(scaler, optimizer, params, overflowed)
    assert scaler.get_scale() == 2.0**15
    assert_same(snapshot(optimizer), before)
    scaled_step(scaler, optimizer, params, random_tensors(3))
    assert not torch.equal(params[0].detach(), before[0][0])


def test_the_state_goes_through_a_file_of_plain_values_and_steps_on_exactly():
    start, steps = random_tensors(0), [random_tensors(seed) for seed in range(1, 5)]
    whole, halves = parameters(start), parameters(start)
    one, other = LARS(whole, **RATES), LARS(halves, **RATES)
    for number, gradients in enumerate(steps):
        if number == 2:
            file = io.BytesIO()
            torch.save(other.state_dict(), file)
            file.seek(0)
            other = LARS(halves, lr=0.1)
            other.load_state_dict(torch.load(file, weights_only=True))
        for params, optimizer in ((whole, one), (halves, other)):
            give(params, gradients)
            optimizer.step()
    assert_same(whole, halves)


def test_a_run_with_lars_stops_and_goes_on_exactly(tiny, tmp_path):
    for name, stop in (("whole", "null"), ("halves", 7), ("halves", "null")):
        overrides = tiny("optimizer.name=lars", "optimizer.base_lr=8", "data.val=null", f"run.name={name}")
        fastsiam.pretrain(load_config("quickstart", [*overrides, f"train.max_steps={stop}"]))
    whole, halves = tmp_path / "runs/whole", tmp_path / "runs/halves"
    assert_same(weights(halves), weights(whole))
    assert numbers(halves, "train", "loss").tolist() == numbers(whole, "train", "loss").tolist()
    assert len(numbers(whole, "train", "loss")) == 20
