"""Compilation is counted, may fail, and fails on all ranks together."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from fastsiam.runtime.compile import Compiled
from fastsiam.runtime.distributed import World
from tests.support.compiling import Net, batch, compare, replaced_backend, seeded
from tests.support.processes import run_python


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


def test_the_numbers_are_those_of_eager_and_each_compilation_is_counted():
    module = seeded(Net)
    compiled = Compiled(module, World())
    assert not compiled.changed()
    compare(compiled, module)
    report = compiled.report()
    seconds = report.pop("seconds")
    assert 0 < seconds < 300
    assert report == {"graphs": 1, "recompiles": 0, "graph_breaks": 0, "fallback": None}
    assert (compiled.changed(), compiled.changed()) == (True, False)
    compare(compiled, module, sizes=(8, 10, 8))
    assert compiled.report() | {"seconds": 0} == report | {"graphs": 2, "recompiles": 1, "seconds": 0}
    assert compiled.report()["seconds"] > seconds
    assert (compiled.changed(), compiled.changed()) == (True, False)


def test_backward_is_compiled_before_anything_runs(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no backward kernel\nand more lines")

    replaced_backend(monkeypatch, aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fails))
    module = seeded(Net)
    compiled = Compiled(module, World())
    compare(compiled, module)
    assert compiled.fallback == "RuntimeError: no backward kernel"
    assert module.norm.num_batches_tracked == 3


def test_a_module_that_cannot_be_traced_runs_as_it_is():
    module = seeded(Broken)
    compiled = Compiled(module, World())
    compare(compiled, module)
    report = compiled.report()
    assert report["fallback"].startswith("Unsupported: ")
    assert "graph_break()" in report["fallback"]
    assert report["graphs"] == report["recompiles"] == 0
    assert (compiled.changed(), compiled.changed()) == (True, False)


def test_a_frame_that_inductor_refuses_is_told(monkeypatch):
    """Where Inductor raises this (bf16 on a GPU without it), Dynamo would run the frame eagerly in silence."""

    def refuses(graph, inputs):
        raise torch._dynamo.exc.SkipFrame("BF16 is not supported")

    replaced_backend(monkeypatch, refuses)
    module = seeded(Net)
    compiled = Compiled(module, World())
    compare(compiled, module)
    assert compiled.fallback == "RuntimeError: Inductor refuses the graph: BF16 is not supported"


def test_a_compiler_that_is_switched_off_is_told():
    module = seeded(Net)
    compiled = Compiled(module, World())
    torch.compiler.set_stance("force_eager")
    try:
        compare(compiled, module)
    finally:
        torch.compiler.set_stance("default")
    assert compiled.fallback == "torch.compile compiled nothing; is it switched off (TORCHDYNAMO_DISABLE)?"


WITHOUT_COMPILER = """
import json
from fastsiam.runtime.compile import Compiled
from fastsiam.runtime.distributed import World
from tests.support.compiling import Net, compare, seeded
module = seeded(Net)
compiled = Compiled(module, World())
compare(compiled, module)
print(json.dumps(compiled.report()))
"""


def test_without_a_cpp_compiler_the_module_runs_as_it_is(tmp_path):
    done = run_python("-c", WITHOUT_COMPILER, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fallback"].startswith("InvalidCxxCompiler: No working C++ compiler found"), report
    assert report["graphs"] == 0


def test_an_error_of_the_step_is_raised_in_its_own_words():
    compiled = Compiled(seeded(Net), World())
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 6") as raised:
        compiled(torch.randn(8, 5))
    assert not isinstance(raised.value, torch._dynamo.exc.TorchDynamoException)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("none left")])
def test_out_of_memory_is_no_missing_compiler(monkeypatch, error):
    def fails(graph, inputs):
        raise error

    replaced_backend(monkeypatch, fails)
    with pytest.raises(type(error), match=str(error)):
        Compiled(seeded(Net), World())(batch(0))


WHEN_RUN = SimpleNamespace(call=None)


@torch.library.custom_op("fastsiam_tests::probe", mutates_args=())
def probe(x: torch.Tensor) -> torch.Tensor:
    """Calls `WHEN_RUN.call` when it runs, and not when it is traced."""
    WHEN_RUN.call()
    return x.clone()


probe.register_fake(torch.empty_like)


class Probed(nn.Module):
    def forward(self, x):
        return probe(x)


@pytest.mark.parametrize("kind", [RuntimeError, torch._dynamo.exc.InternalTorchDynamoError])
def test_an_error_of_the_running_step_is_no_failed_compilation(monkeypatch, kind):
    def fails():
        raise kind("device lost")

    monkeypatch.setattr(WHEN_RUN, "call", fails)
    compiled = Compiled(Probed(), World())
    for _ in range(2):
        with pytest.raises(kind, match="device lost"):
            compiled(torch.ones(3))
    assert compiled.fallback is None
    assert compiled.report()["graphs"] == 1


def test_the_pause_covers_the_compilation_and_not_the_step(monkeypatch):
    depth, seen = [0], []

    @contextlib.contextmanager
    def paused():
        depth[0] += 1
        yield
        depth[0] -= 1

    def backend(graph, inputs):
        seen.append(("compiles", depth[0] > 0))
        return graph.forward

    replaced_backend(monkeypatch, backend)
    monkeypatch.setattr(WHEN_RUN, "call", lambda: seen.append(("runs", depth[0] > 0)))

    class Watched(World):
        def collect(self, value):
            seen.append(("agrees", depth[0] > 0))
            return super().collect(value)

    compiled = Compiled(Probed(), Watched(), paused=paused)
    for shape in (3, 3, (2, 2)):
        compiled(torch.ones(shape))
    assert seen == [
        ("compiles", True),
        ("agrees", True),
        ("runs", False),
        ("runs", False),
        ("compiles", True),
        ("runs", False),
    ]
    assert depth == [0]


class Together(Net):
    """With a collective in its forward, which a rank alone would wait in for ever."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken
        self.uncompiled_calls = 0

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.uncompiled_calls += 1
        if self.broken:
            torch._dynamo.graph_break()
        everybody = all_gather_tensor_autograd(x, gather_dim=0, group=dist.group.WORLD.group_name)
        return super().forward(everybody)


def three_steps(fails, how):
    """Rank `fails` cannot trace, or cannot compile; the steps, and why they ran uncompiled."""
    torch._dynamo.reset()
    rank = dist.get_rank()
    mine = rank == fails
    torch.manual_seed(0)
    module = Together(broken=mine and how == "tracing")
    exchanged = []

    class Counted(World):
        def collect(self, value):
            exchanged.append(value)
            return super().collect(value)

    without = {"cpp.cxx": (None, "/nonexistent"), "force_disable_caches": True} if mine and how == "backend" else {}
    with torch._inductor.config.patch(without):
        compiled = Compiled(module, Counted(rank, 2, rank, 2))
        found = []
        for step in range(3):
            x = batch(10 * step + rank)
            out = compiled(x)
            out["loss"].backward()
            found.append(out["loss"].item())
    return found, module.norm.running_mean, compiled.fallback, module.uncompiled_calls, len(exchanged)


@pytest.mark.parametrize(
    ("fails", "how", "reason"),
    [(1, "tracing", "Unsupported: "), (1, "backend", "InvalidCxxCompiler: "), (None, None, None)],
)
def test_ranks_fall_back_together(ranks, fails, how, reason):
    first, second = ranks(2, three_steps, fails, how)
    torch.manual_seed(0)
    whole = Net()
    losses = [whole(torch.cat([batch(10 * step), batch(10 * step + 1)]))["loss"].item() for step in range(3)]
    for found, running_mean, _, uncompiled_calls, exchanges in (first, second):
        assert found == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(running_mean, whole.norm.running_mean)
        assert uncompiled_calls == (3 if reason else 0)
        assert exchanges == 1
    if reason is None:
        assert first[2] is second[2] is None
    else:
        assert second[2].startswith(reason)
        assert first[2] == f"{second[2]} (on rank 1)"
