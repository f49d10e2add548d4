"""Gradients of micro batches are the mean of those of the paper's formula; everything else is that of one step."""

import copy
import re

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from fastsiam.models.batch_norm import split_statistics
from fastsiam.training.micro_batch import micro_batch_of, together
from tests.support.compiling import replaced_backend
from tests.support.networks import one_layer
from tests.support.numerics import algorithm_1
from tests.support.refusals import refuses
from tests.support.runs import refused_unwritten
from tests.support.steps import build_step, trained, views_of_step

# Three micro batches of four images.
CUT = ("train.batch_size=12", "train.micro_batch=4")


def simsiam():
    torch.manual_seed(0)
    return one_layer().double()


def test_gradients_are_the_mean_over_a_loop_of_the_papers_formula(tiny_config):
    plain = simsiam()
    step = build_step(tiny_config(*CUT), method=split_statistics(copy.deepcopy(plain), 2))
    views = views_of_step(1, 12)
    first, second = views[0].chunk(2)
    losses = []
    for number in range(3):
        z1, z2 = (plain.projector(plain.encoder(view[number::3])) for view in (first, second))
        losses.append(algorithm_1(plain.predictor(z1), plain.predictor(z2), z1, z2))
    (sum(losses) / 3).backward()
    out = step(views, 1)
    assert out["loss"].item() == pytest.approx(sum(losses).item() / 3, abs=1e-12)
    for ours, reference in zip(step.method.parameters(), plain.parameters(), strict=True):
        # Batch norm takes away what a bias adds.
        assert reference.ndim == 1 or reference.grad.abs().max() > 1e-6
        torch.testing.assert_close(ours.grad, reference.grad, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(dict(step.method.encoder.named_buffers()), dict(plain.encoder.named_buffers()))
    # One step of SGD whose weight decay is added to that gradient.
    (group, *_), (ours, before) = step.optimizer.param_groups, (next(m.parameters()) for m in (step.method, simsiam()))
    moved = before - group["lr"] * (ours.grad + group["weight_decay"] * before)
    torch.testing.assert_close(ours.detach(), moved.detach(), atol=1e-12, rtol=1e-12)


def test_z_of_a_step_has_the_rows_of_its_views(tiny_config):
    """Of a method without batch norm, for which micro batches change nothing at all."""
    results = []
    for cut in ((), CUT[1:]):
        method = simsiam()
        for layers, place in ((method.encoder, 1), (method.projector, 1)):
            layers[place] = torch.nn.Identity()
        step = build_step(tiny_config(CUT[0], *cut), method=method)
        out = step(views_of_step(1, 12), 1)
        results.append((out, [parameter.grad for parameter in method.parameters()]))
    assert results[0][0]["z"].shape == (24, 8)
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-10)


def test_micro_batches_of_groups_of_views_have_all_images_once_and_one_layout():
    def numbered(count, size, memory_format):
        of_image = torch.arange(count * 6.0).view(-1, 1, 1, 1) % 6
        return of_image.expand(-1, 3, size, size).contiguous(memory_format=memory_format)

    for memory_format in (torch.channels_last, torch.contiguous_format):
        views = [numbered(2, 8, memory_format), numbered(3, 4, memory_format)]
        parts = [micro_batch_of(views, number, 3) for number in range(3)]
        assert [part[1][:, 0, 0, 0].tolist() for part in parts] == [[0, 3] * 3, [1, 4] * 3, [2, 5] * 3]
        for first, second in parts:
            assert first[:, 0, 0, 0].tolist() * 2 == second[:, 0, 0, 0].tolist() + first[:2, 0, 0, 0].tolist()
            assert first.is_contiguous(memory_format=memory_format)
            assert (first.stride(), second.stride()) == (parts[0][0].stride(), parts[0][1].stride())
        rows = together([{"z": part[0][:, 0, 0, :1], "loss": part[0].mean()} for part in parts])
        assert torch.equal(rows["z"], views[0][:, 0, 0, :1])
        assert rows["loss"] == 2.5


def test_two_ranks_take_the_micro_batches_of_one(ranks, tiny_config):
    config = tiny_config(*CUT, "evaluate.average=ema", "train.checkpoint_activations=true")
    losses, expected = trained(config, 3)
    whole, _ = trained(tiny_config(CUT[0]), 3)
    assert abs(losses[-1] - whole[-1]) > 1e-4
    for of_rank, state in ranks(2, trained, config, 3):
        assert of_rank == pytest.approx(losses, abs=1e-10)
        for part in ("method", "average"):
            torch.testing.assert_close(state[part], expected[part], atol=1e-10, rtol=1e-10)


def test_gradients_travel_once_a_step(ranks, tiny_config):
    for of_backward in ranks(2, exchanges, tiny_config(*CUT)):
        # Batch norm's collectives are another operation.
        assert of_backward == [1]


def exchanges(config):
    """Number of backward passes of each step after which the ranks' gradients are the same."""
    from torch import distributed

    from tests.support.gloo_ranks import world

    step, found = build_step(config, world=world()), []
    parameter = next(step.method.encoder.parameters())
    real = torch.Tensor.backward

    def backward(self):
        real(self)
        gathered = [torch.empty_like(parameter.grad) for _ in range(2)]
        distributed.all_gather(gathered, parameter.grad.contiguous())
        found.append(torch.equal(*gathered))

    torch.Tensor.backward = backward
    try:
        step(views_of_step(step._world.rank, 6), 1)
    finally:
        torch.Tensor.backward = real
    assert found[-1]
    return [sum(found)]


def test_a_bad_image_in_any_micro_batch_is_found(tiny_config):
    for place in range(3):
        step = build_step(tiny_config(*CUT))
        views = views_of_step(1, 12)
        views[0][place, 0, 0, 0] = torch.nan
        step(views_of_step(2, 12), 1, np.arange(12))
        step(views, 2, np.arange(12, 24))
        reading = step.read()
        assert (reading.first_bad_step, reading.bad_images.tolist()) == (2, list(range(12, 24)))


def test_fp16_skips_a_step_of_which_one_micro_batch_overflows(tiny_config):
    step = build_step(tiny_config(*CUT, "evaluate.average=ema"), torch.float16)
    views = views_of_step(1, 12, dtype=torch.float16)
    for _ in range(3):
        step(views, 1)
    real, seen = step._forward, []

    def overflowing(views):
        out = real(views)
        seen.append(len(views[0]))
        return out | {"loss": out["loss"] * (1e30 if len(seen) == 2 else 1)}

    before, step._forward = copy.deepcopy(step.state_dict()), overflowing
    step(views, 2)
    after = copy.deepcopy(step.state_dict())
    assert seen == [8, 8, 8]
    # Steps before it may have overflowed by themselves.
    assert after["skipped_steps"] == before["skipped_steps"] + 1
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    parameters = [name for name, _ in step.method.named_parameters()]
    assert all(torch.equal(after["method"][name], before["method"][name]) for name in parameters)
    floats = [name for name, value in after["average"].items() if value.is_floating_point()]
    assert all(torch.equal(after["average"][name], before["average"][name]) for name in floats)
    step(views, 3)
    moved = step.state_dict()
    assert moved["skipped_steps"] == after["skipped_steps"]
    assert not torch.equal(moved["method"]["encoder.conv1.weight"], after["method"]["encoder.conv1.weight"])
    assert not torch.equal(moved["average"]["conv1.weight"], after["average"]["conv1.weight"])


def test_all_micro_batches_of_all_steps_are_one_graph(tiny_config, monkeypatch):
    torch._dynamo.reset()
    replaced_backend(monkeypatch, lookup_backend("eager"))
    config = tiny_config(*CUT, "evaluate.average=ema")
    methods = [split_statistics(simsiam(), 2) for _ in range(2)]
    steps = [build_step(config, torch.float32, compiles=bool(n), method=method) for n, method in enumerate(methods)]
    for number in range(1, 4):
        losses = [step(views_of_step(number, 12, dtype=torch.float32), number)["loss"] for step in steps]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    report = steps[1].compiled.report()
    assert (report["graphs"], report["recompiles"]) == (1, 0)


@pytest.mark.parametrize("micro_batch", [None, 6])
def test_what_does_not_fit_is_told_with_the_micro_batch_that_does(tiny_config, monkeypatch, micro_batch):
    """Memory for a forward pass of three images beside views and gradients."""
    cut = () if micro_batch is None else (f"train.micro_batch={micro_batch}",)
    step = build_step(tiny_config(CUT[0], *cut))
    real, tried = step.method.forward, []

    def small_gpu(views):
        tried.append(len(views[0]) // 2)
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(views)

    monkeypatch.setattr(step.method, "forward", small_gpu)
    with refuses("out-of-memory", "train.batch_size") as error:
        step(views_of_step(1, 12), 1)
    said = str(error.value)
    assert re.search(r"train\.micro_batch=(\d+) fits", said)[1] == "3"
    assert "train.checkpoint_activations=true" in said
    assert tried == [micro_batch or 12, *([6] if micro_batch is None else []), 4, 3, 3, 3, 3]


def test_what_cannot_be_cut_is_refused_before_anything_is_written(tiny, tmp_path, capsys):
    for overrides, nearest in (
        (("train.batch_size=12", "train.micro_batch=5"), ["4", "6"]),
        (("train.batch_size=12", "train.micro_batch=24"), ["12"]),
    ):
        error = refused_unwritten(capsys, tmp_path, *tiny(*overrides))
        assert (error.code, error.key) == ("micro-batch-not-divisible", "train.micro_batch")
        assert re.findall(r"\d+", str(error).partition("; set ")[2]) == nearest


def refused_by_rank(overrides):
    from fastsiam.errors import UserError
    from tests.support.runs import train_here

    try:
        train_here(overrides)
    except UserError as error:
        return error.code, re.findall(r"\d+", str(error).partition("; set ")[2])
    except SystemExit as error:
        return error.code


def test_ranks_refuse_a_micro_batch_that_they_cannot_share(ranks, tiny):
    told = ranks(2, refused_by_rank, tiny("train.batch_size=12", "train.micro_batch=3"))
    assert told[0] == ("micro-batch-not-divisible", ["2", "4"])
