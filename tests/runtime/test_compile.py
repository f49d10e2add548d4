"""Compilation: chosen where its tools are, counted, paused for, and refused in one sentence where it fails."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsiam.runtime import compile as compiling
from fastsiam.runtime.compile import Compiled, eager_reason
from fastsiam.runtime.device import choose_compile
from tests.support.compiling import Net, batch, compare, replaced_backend, seeded
from tests.support.refusals import refuses


class Broken(Net):
    """Cannot be traced as one graph."""

    def forward(self, x):
        out = super().forward(x)
        torch._dynamo.graph_break()
        return out


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Dynamo counts the recompilations of a class's code over all its objects."""
    torch._dynamo.reset()


@pytest.mark.parametrize("missing", [None, "cuda", "triton", "g++", "CXX"])
def test_auto_compiles_where_cuda_triton_and_a_compiler_are_found(monkeypatch, missing):
    device = torch.device("cpu" if missing == "cuda" else "cuda")
    monkeypatch.delenv("CXX", raising=False)
    if missing == "CXX":
        monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(compiling, "find_spec", lambda name: None if name == missing else name)
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: real(name) if name != "g++" else missing != "g++" or None)
    assert (eager_reason(device) is None) == (missing is None)
    assert choose_compile("auto", device) == (missing is None)
    assert choose_compile("on", device)
    assert not choose_compile("off", device)


@pytest.mark.slow
@pytest.mark.needs("g++")
def test_inductor_compiles_one_graph_that_steps_as_the_module_does():
    module = seeded(Net)
    compiled = Compiled(module)
    compare(compiled, module)
    report = compiled.report()
    assert (report["graphs"], report["recompiles"]) == (1, 0)
    assert report["seconds"] > 0
    assert module.norm.num_batches_tracked == 3


def test_each_new_graph_is_reported_once(monkeypatch):
    replaced_backend(monkeypatch, lambda graph, inputs: graph.forward)
    module = seeded(Net)
    compiled = Compiled(module)
    assert compiled.take_news() is None
    compare(compiled, module, sizes=(8, 8))
    assert compiled.take_news()["graphs"] == 1
    compare(compiled, module, sizes=(8, 10))
    assert compiled.take_news()["recompiles"] == 1
    assert compiled.take_news() is None


def raises(error):
    def backend(graph, inputs):
        raise error

    return backend


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        (Broken, None),
        (Net, raises(RuntimeError("no working compiler\nat all"))),
        # Dynamo runs a frame that Inductor skips (bf16 on a GPU without it) as it is, and says nothing.
        (Net, raises(torch._dynamo.exc.SkipFrame("BF16 is not supported"))),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(monkeypatch, kind, backend):
    if backend:
        replaced_backend(monkeypatch, backend)
    with refuses("compile-failed", "train.compile") as raised:
        Compiled(seeded(kind))(batch(0))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 160


def test_a_compiler_that_is_switched_off_is_one_sentence():
    with torch.compiler.set_stance("force_eager"), refuses("compile-failed"):
        Compiled(seeded(Net))(batch(0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("none left")])
def test_out_of_memory_is_not_a_compiler_that_fails(monkeypatch, error):
    replaced_backend(monkeypatch, raises(error))
    with pytest.raises(type(error), match=str(error)):
        Compiled(seeded(Net))(batch(0))


WHEN_RUN = SimpleNamespace(call=None)


@torch.library.custom_op("fastsiam_tests::probe", mutates_args=())
def probe(x: torch.Tensor) -> torch.Tensor:
    """Calls `WHEN_RUN.call` when it runs, and not when it is traced."""
    WHEN_RUN.call()
    return x.clone()


probe.register_fake(torch.empty_like)


class Probed(nn.Module):
    def forward(self, views):
        return probe(views[0])


def test_the_pause_covers_the_compilation_and_not_the_step(monkeypatch):
    depth, seen = [0], []

    @contextlib.contextmanager
    def paused():
        depth[0] += 1
        yield
        depth[0] -= 1

    def backend(graph, inputs):
        seen.append(("compiles", depth[0]))
        return graph.forward

    replaced_backend(monkeypatch, backend)
    monkeypatch.setattr(WHEN_RUN, "call", lambda: seen.append(("runs", depth[0])))
    compiled = Compiled(Probed(), paused=paused)
    for shape in (3, 3, (2, 2)):
        compiled([torch.ones(shape)])
    assert seen == [("compiles", 1), ("runs", 0), ("runs", 0), ("compiles", 1), ("runs", 0)]


def test_an_error_of_the_running_step_is_raised_as_it_is(monkeypatch):
    monkeypatch.setattr(WHEN_RUN, "call", lambda: (_ for _ in ()).throw(RuntimeError("device lost")))
    replaced_backend(monkeypatch, lambda graph, inputs: graph.forward)
    with pytest.raises(RuntimeError, match="^device lost$"):
        Compiled(Probed())([torch.ones(3)])
