"""benchmarks.step: its rows are one function, the product's row is the product, its arithmetic is right."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks import step as step_benchmark
from benchmarks.harness.flops import flops_per_image
from benchmarks.harness.product import ProductRun
from benchmarks.harness.results import Results
from benchmarks.peers import authors
from benchmarks.variants import step as variants
from benchmarks.variants.step import Switches, ablation, build_ablated, initial_weights, product
from fastsiam.config import load_config
from fastsiam.data.build import build_loader
from fastsiam.errors import UserError
from fastsiam.kernels import batch_norm_numba
from fastsiam.models import convolution
from tests.support.bench_configs import CPU, batches, small_config


def test_the_product_takes_one_step_a_call_and_its_switches_are_the_last_row(tiny):
    """The loop of a run that `fastsiam.train` would make, and its step with the switches of the row `fastsiam`."""
    overrides = tiny("data.backend=synthetic", "data.train=null", "data.val=null", "train.log_every_steps=1")
    config = load_config("quickstart", [*overrides, "optimizer.schedule=constant", "optimizer.warmup=0"])
    (views,) = next(build_loader(config, device=CPU).epoch(0)).views
    switched = build_ablated(product(CPU, torch.float32), config, initial_weights(config), CPU)
    with ProductRun(config) as run:
        for number in range(5):
            run(number)
            assert run.parts.progress.state.step == number + 1
            assert run.parts.step.read().loss == switched(views).item()
        folder = run.parts.run.folder.path
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert not folder.exists()


def test_an_error_of_the_products_loop_is_raised_by_the_call(tiny, monkeypatch):
    overrides = tiny("data.backend=synthetic", "data.train=null", "data.val=null")
    with ProductRun(load_config("quickstart", overrides)) as run:
        run()
        monkeypatch.setattr(run.parts.step, "optimizer", None)
        with pytest.raises(AttributeError):
            run()
    with pytest.raises(UserError):
        ProductRun(load_config("quickstart", tiny("data.train=nowhere")))


def test_every_row_is_the_same_function_in_fp32():
    """Losses and weights over four steps; a strong weight decay makes that of each optimizer show."""
    config = small_config(3, "optimizer.weight_decay=0.1")
    weights = initial_weights(config)
    rows = {name: switches for name, switches in ablation(CPU, torch.float32).items() if not switches.compile}
    assert len(rows) == 7
    losses, states = {}, {}
    for name, switches in rows.items():
        step = build_ablated(switches, config, weights, CPU)
        losses[name], states[name] = [step(views).item() for views in batches(4)], step.model.state_dict()
    for name in rows:
        assert losses[name] == pytest.approx(losses["authors"], abs=1e-5), name
        for key, value in states[name].items():
            torch.testing.assert_close(value, states["authors"][key], rtol=1e-5, atol=1e-5)


def test_bf16_rows_stay_near_fp32():
    config = small_config()
    weights = initial_weights(config)
    expected = build_ablated(Switches(), config, weights, CPU)(batches(1)[0]).item()
    for name, switches in ablation(CPU, torch.bfloat16).items():
        if not switches.compile:
            views = batches(1)[0].to(torch.float32 if switches.forward == "authors" else torch.bfloat16)
            found = build_ablated(switches, config, weights, CPU)(views).item()
            assert found == pytest.approx(expected, abs=0.02), name
            assert name == "authors" or found != expected, name


@pytest.mark.parametrize(("kind", "amx"), [("cpu", False), ("cpu", True), ("cuda", True)])
def test_each_row_turns_on_one_switch_more(kind, amx, monkeypatch):
    """Rows need no device to be listed."""
    monkeypatch.setattr(variants, "multiplies_tiles", lambda: amx)
    device = torch.device(kind)
    rows = ablation(device, torch.bfloat16)
    beside = {"compile, two calls", "compile max-autotune", "compile with CUDA graphs"}
    ladder = [switches for name, switches in rows.items() if name not in beside]
    if kind == "cpu":
        # The product does not compile on a CPU: the optimizers stand on the last uncompiled row.
        compiled = ladder.index(rows["+ compile"])
        assert ladder.pop(compiled) == dataclasses.replace(ladder[compiled - 1], compile="default")
        assert ladder[-1] == product(device, torch.bfloat16)
    for before, after in pairwise(ladder):
        before, after = dataclasses.asdict(before), dataclasses.asdict(after)
        assert sum(before[key] != after[key] for key in before) == 1
    last = {"cuda": "+ fused SGD", "cpu": "+ convolutions by matrix products" if amx else "+ batch norm by kernels"}[
        kind
    ]
    assert rows[last] == product(device, torch.bfloat16)


@pytest.mark.parametrize("convolutions", ["torch", "products"])
def test_rows_convolve_as_their_switch_says(convolutions, monkeypatch):
    monkeypatch.setattr(convolution, "multiplies_tiles", lambda: True)
    switches = Switches(precision="bf16", channels_last=True, forward="one_call", convolutions=convolutions)
    config = small_config()
    method = build_ablated(switches, config, initial_weights(config), CPU).model
    plain = {type(layer) is nn.Conv2d for layer in method.modules() if isinstance(layer, nn.Conv2d)}
    assert plain == {convolutions == "torch"}


@pytest.mark.parametrize("norms", ["torch", "kernels"])
def test_rows_normalise_as_their_switch_says(norms, monkeypatch):
    calls, statistics = [], batch_norm_numba.statistics_op
    monkeypatch.setattr(batch_norm_numba, "statistics_op", lambda *given: calls.append(0) or statistics(*given))
    switches = Switches(precision="bf16", channels_last=True, forward="one_call", norms=norms)
    config = small_config()
    build_ablated(switches, config, initial_weights(config), CPU)(batches(1)[0].to(torch.bfloat16))
    assert bool(calls) == (norms == "kernels")


def test_flops_of_resnet50_are_those_of_the_paper():
    """He et al. 2016 and torchvision: 4.09 G multiply-adds forward at 224 px. Backward costs twice that but for the
    stem, whose input needs no gradient (118 M); the heads have 14.7 M (SimSiam, section 4)."""
    views = 2 * (6 * 4.089e9 - 2 * 0.118e9 + 6 * 14.68e6)
    assert flops_per_image(load_config("r50_100ep")) == pytest.approx(views, rel=0.01)


def test_flops_do_not_depend_on_the_implementation():
    config = small_config()
    assert flops_per_image(config) == 2 * _counted_by_hand(config)


def _counted_by_hand(config):
    """Forward and backward of one view, layer by layer from the shapes that pass through the model."""
    model, total = authors.SimSiam(config.model, config.method), 0

    def add(layer, inputs, output):
        nonlocal total
        multiply_adds = layer.weight.numel() * output.numel() // output.shape[0] // layer.weight.shape[0]
        total += (4 if layer is model.encoder.conv1 else 6) * multiply_adds

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(add)
    view = torch.zeros(2, 3, config.views[0].size, config.views[0].size)
    model.predictor(model.projector(model.encoder(view)))
    return total


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A function that runs the benchmark on the small config for so many minutes, and gives its lines by variant."""
    (tmp_path / "small.yaml").write_text(small_config().to_yaml())
    monkeypatch.setattr(step_benchmark, "SETTINGS", {"cpu": ((str(tmp_path / "small.yaml"), 4),)})
    monkeypatch.setattr(step_benchmark, "REPEATS", 3)
    monkeypatch.setattr(step_benchmark, "COMPILE_SECONDS", {None: 0, "default": 1e9})

    def run(minutes, **options):
        step_benchmark.run(Results(tmp_path / "out", CPU), device=CPU, minutes=minutes, **options)
        text = (tmp_path / "out" / "step.jsonl").read_text()
        return {line["variant"]: line for line in map(json.loads, text.splitlines())}

    return run


@pytest.mark.slow
def test_lines_hold_rates_and_nothing_is_dropped(lines):
    """Rows that keep memory run in a second process: their losses cannot be seen here, times and switches can."""
    found = lines(minutes=5)
    assert list(found) == [*ablation(CPU, torch.float32), "fastsiam", "lightly", "solo-learn"]
    for name, line in found.items():
        assert line["params"] == {"encoder": "cifar_resnet8", "size": 16, "batch": 4}
        if "absent" not in line:
            assert line["images_per_second"] == pytest.approx(4 / line["median_seconds"])
            assert line["flops_per_image"] == flops_per_image(small_config())
            assert line["share_of_L0"] is None
            assert len(line["samples_seconds"]) == 3, name
    kept = {name for name, line in found.items() if line["switches"]["memory"] == "kept"}
    assert kept == {"+ freed memory kept", "+ batch norm by kernels", "fastsiam"}
    absent = {name: line["absent"] for name, line in found.items() if "absent" in line and name != "lightly"}
    assert absent == {
        "+ compile": "the time was too short; give more --minutes",
        "compile, two calls": "the time was too short; give more --minutes",
        "solo-learn": "give a checkout of github.com/vturrisi/solo-learn with --solo-learn PATH",
    }


def test_little_time_still_compares_the_ends(lines, monkeypatch):
    monkeypatch.setattr(step_benchmark.Setting, "rows", step_benchmark.Setting.rows_here)
    found = lines(minutes=0)
    assert {"authors", "fastsiam"} <= {name for name, line in found.items() if line["samples_seconds"]}
    assert "the time was too short" in found["+ one call"]["absent"]


def test_rows_that_are_asked_for_are_measured_whatever_the_time(lines, monkeypatch):
    """A compiled one too, of which Inductor needs no part here; --config and --batch choose another setting."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    found = lines(minutes=0, config="quickstart", batch=6, rows=("+ compile", "+ one call"))
    assert list(found) == ["+ one call", "+ compile"]
    for line in found.values():
        assert line["params"] == {"encoder": "cifar_resnet8", "size": 32, "batch": 6}
        assert line["median_seconds"] > 0
    assert found["+ compile"]["switches"]["compile"] == "default"


def test_a_row_that_is_not_there_is_a_sentence(lines, tmp_path):
    with pytest.raises(UserError) as caught:
        lines(minutes=0, rows=("fastsiam", "compiled"))
    assert caught.value.code == "unknown-row"
    assert not (tmp_path / "out/step.jsonl").exists()
