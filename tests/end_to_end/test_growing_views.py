"""Runs whose views grow: what they say and write, where they are evaluated, compiled and resumed."""

import copy
import re

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

import fastsiam
from fastsiam.methods import build_method
from fastsiam.models.encoder import CifarResNet
from fastsiam.optim.build import build_optimizer
from fastsiam.runtime.compile import Compiled
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.train import main
from fastsiam.training.step import TrainingStep
from tests.support.compiling import Net, compare, replaced_backend, seeded
from tests.support.refusals import refuses
from tests.support.runs import lines, weights

CPU = torch.device("cpu")
# Ten steps an epoch.
GROWING = ("views.size=16..32", "train.epochs=5")
SIZES = [16, 16, 24, 24, 32]


@pytest.fixture
def sides_seen(monkeypatch):
    """(training mode, side in pixels) of each call of an encoder."""
    seen = []
    real = CifarResNet.forward
    monkeypatch.setattr(
        CifarResNet, "forward", lambda self, x: seen.append((self.training, x.shape[-1])) or real(self, x)
    )
    return seen


def test_a_run_trains_at_each_size_and_evaluates_at_the_full_one(tiny, tmp_path, capsys, sides_seen):
    assert main(["--config", "quickstart", *tiny(*GROWING, "evaluate.controls=true")]) == 0
    said = capsys.readouterr().out
    assert "views     2 x 16..32 px (16, 24, 32), recipe demo" in said
    assert re.search(r"epoch \d/5  step \d+/50  (16|24|32) px  loss", said)
    assert "views     the run ended" not in said
    trained = [side for training, side in sides_seen if training]
    steps = [size for size in SIZES for _ in range(10)]
    # Before the first kNN the control fills its batch-norm statistics with 25 batches.
    assert trained == steps[:10] + 25 * [32] + steps[10:]
    assert {side for training, side in sides_seen if not training} == {32}
    metrics = lines(tmp_path / "runs/run")
    train = [line["view_size"] for line in metrics if line["kind"] == "train"]
    assert train == steps
    controls, *knn = (line for line in metrics if line["kind"] == "knn")
    assert [line["step"] for line in knn] == [10, 20, 30, 40, 50]
    fixed = tiny("views.size=32", "evaluate.controls=true", "train.max_steps=1", "run.name=fixed")
    assert main(["--config", "quickstart", *fixed]) == 0
    assert controls == next(line for line in lines(tmp_path / "runs/fixed") if line["kind"] == "knn")


def test_a_budget_of_images_stopped_in_mid_epoch_goes_on_at_its_size(tiny, tmp_path, capsys):
    """4.5 epochs, stopped in the second and in the third; a run that ends early prints at which size."""
    growing = ("views.size=16..32", "train.epochs=null", "budget=360 images", "data.val=null")
    assert main(["--config", "quickstart", *tiny(*growing, "run.name=whole")]) == 0
    for steps, end in ((13, "at 16 px, before"), (23, "at 24 px, before"), ("null", "")):
        capsys.readouterr()
        assert main(["--config", "quickstart", *tiny(*growing, "run.name=parts", f"train.max_steps={steps}")]) == 0
        said = capsys.readouterr().out
        assert end in said
        assert ("views     the run ended" in said) == bool(end)
    one, other = tmp_path / "runs/whole", tmp_path / "runs/parts"
    kept = [
        [(line["step"], line["view_size"], line["loss"]) for line in lines(folder) if line["kind"] == "train"]
        for folder in (one, other)
    ]
    assert kept[0] == kept[1]
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert [size for _, size, _ in kept[0]] == 10 * [16] + 10 * [16] + 10 * [24] + 15 * [32]


@pytest.mark.slow
def test_each_size_is_one_graph_of_static_shapes_and_no_recompilation(tiny, tmp_path, monkeypatch):
    torch._dynamo.reset()
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs if x.dim() == 4 and x.shape[1] == 3 and x.shape[0] == 16)
        return lookup_backend("aot_eager")(graph, inputs)

    replaced_backend(monkeypatch, backend)
    losses = {}
    for setting in ("off", "on"):
        overrides = tiny(*GROWING, f"train.compile={setting}", f"run.name={setting}", "data.val=null")
        fastsiam.pretrain(fastsiam.load_config("quickstart", overrides))
        losses[setting] = [line["loss"] for line in lines(tmp_path / "runs" / setting) if line["kind"] == "train"]
    assert shapes == [(16, 3, size, size) for size in (16, 24, 32)]
    assert all(type(side) is int for shape in shapes for side in shape)
    compiled = [line for line in lines(tmp_path / "runs/on") if line["kind"] == "compile"]
    assert [(line["step"], line["graphs"], line["recompiles"]) for line in compiled] == [
        (0, 1, 0),
        (20, 2, 0),
        (40, 3, 0),
    ]
    # Rounding apart: after six steps 4e-6, after ten of this small batch 3e-6 to 4e-3, by the seed.
    assert losses["on"][:6] == pytest.approx(losses["off"][:6], abs=2e-5)


def test_what_was_not_planned_is_counted_as_a_recompilation(monkeypatch):
    """The eight rows of the net's input stand for groups of views: their last side is 6."""
    torch._dynamo.reset()
    replaced_backend(monkeypatch, lookup_backend("eager"))
    module = seeded(Net)
    compiled = Compiled(module, sizes=((6,) * 8, (7,) * 8))
    compare(compiled, module, sizes=(8, 10, 8))
    report = compiled.report()
    assert (report["graphs"], report["recompiles"]) == (2, 1)


@pytest.fixture
def step_of(tiny_config):
    def build(*overrides, compiles=False):
        config = tiny_config("train.batch_size=4", *overrides)
        torch.manual_seed(0)
        method = build_method(config)
        optimizer = build_optimizer(method, config)
        return TrainingStep(method, optimizer, config, Runtime(World(), CPU, torch.float32, compiles))

    return build


def test_the_rehearsal_of_the_full_size_leaves_no_trace(step_of, sides_seen):
    step = step_of("views.size=16..32", "views.count=3")
    views = [torch.randn(12, 3, 16, 16)]
    step(views, 1)
    before = copy.deepcopy(step.state_dict())
    step.rehearse()
    assert sides_seen == [(True, 16), (True, 32)]
    after = step.state_dict()
    assert before["method"].keys() == after["method"].keys()
    assert all(torch.equal(before["method"][name], value) for name, value in after["method"].items())
    assert all(parameter.grad is None for parameter in step.method.parameters())
    undisturbed = step_of("views.size=16..32", "views.count=3")
    undisturbed(views, 1)
    assert torch.equal(step(views, 2)["loss"], undisturbed(views, 2)["loss"])


@pytest.mark.parametrize("rehearsed", [True, False])
def test_what_does_not_fit_is_told_for_the_full_size_and_all_views(step_of, monkeypatch, rehearsed):
    """Memory for two images of three views of 32 px, of which the step at hand has four."""
    step = step_of("views.size=16..32", "views.count=3")
    real = step.method.forward

    def small_gpu(views):
        (group,) = views
        if group.shape[0] * group.shape[2] ** 2 > 2 * 3 * 32**2 or (len(group) == 12 and group.shape[2] == 16):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(views)

    monkeypatch.setattr(step.method, "forward", small_gpu)
    with refuses("out-of-memory", "train.batch_size") as error:
        step.rehearse() if rehearsed else step([torch.randn(12, 3, 16, 16)], 1)
    assert re.findall(r"\d+", str(error.value))[:2] == ["4", "2"]


@pytest.mark.parametrize("size", ["16", "16..32"])
def test_smaller_batches_are_tried_without_compiling_them(step_of, monkeypatch, size):
    """A graph for each would take ResNet-50 minutes in which nothing is said."""
    torch._dynamo.reset()
    replaced_backend(monkeypatch, lookup_backend("eager"))
    step = step_of(f"views.size={size}", compiles=True)
    step([torch.randn(8, 3, 16, 16)], 1)
    assert step.compiled.report()["graphs"] == 1
    assert all(step._fits(torch.empty(0), micro_batch) for micro_batch in (2, 4))
    assert step.compiled.report()["graphs"] == 1
