"""torch.compile that counts what it does, and that all ranks leave together where one of them cannot compile."""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, SkipFrame, TorchDynamoException
from torch._dynamo.utils import counters

import fastsiam
from fastsiam import kernels
from fastsiam.runtime.distributed import World


class Compiled:
    """A module compiled as one graph by Inductor; called like the module.

    A compiled forward holds collectives (synchronised batch norm), so a rank that cannot compile must say so before
    the others wait in one for it. On the first call every rank compiles forward and backward, then all exchange
    whether that went well, and only then the first compiled kernel runs. Where it failed on any rank, all of them run
    the module as it is from then on, and `fallback` says why. Nothing of the failed call has run: eager mode does the
    whole step, and raises an error of the step itself (a shape, a value) in its own words. Out of memory while
    compiling is raised, not taken for a compiler that is missing.

    Compiling again for another shape is counted, not agreed on: whether a rank has to depends on its own data, and an
    exchange that only some ranks reach would never end. A failure there is raised, and so is what a kernel meets only
    when it is launched.

    `sizes`: the sides that views (the first argument, [B, 3, S, S]) have in turn. Where there are several, each gets a
    graph of its own for its static shape, which is no recompilation.

    `paused` gives the context (of the watchdog) in which a compilation runs; it may be entered twice at once.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        *,
        sizes: tuple[int, ...] = (),
        paused: Callable = contextlib.nullcontext,
    ):
        self.fallback: str | None = None
        """The first line of why this rank runs the module uncompiled, with the rank where another one failed."""
        self._module = module
        self._world = world
        self._paused = paused
        # By default the second shape would make a graph for shapes of any size.
        dynamic = False if len(sizes) > 1 else None
        self._run = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=self._inductor)
        self._planned = set(sizes) if len(sizes) > 1 else set()
        self._met: set[int] = set()
        self._size: int | None = None
        self._agreed = False
        self._graphs = 0
        self._seconds = 0.0
        self._breaks_before = _graph_breaks()
        self._began = 0.0
        self._changed = False
        self._waiting = contextlib.ExitStack()

    def __call__(self, *arguments, **keywords):
        self._began = time.perf_counter()
        if self._planned:
            self._size = arguments[0].shape[-1]
        if self._agreed:
            return self._run(*arguments, **keywords)
        return self._first_call(arguments, keywords)

    def report(self) -> dict:
        """What the compiler has done so far, as the fields of a `compile` line in metrics.jsonl.

        `graphs`: how often it compiled; `recompiles`: all but the first, or the first of each of the sizes; `seconds`:
        from the call until the new graph could run, tracing included and the wait for other ranks not. `graph_breaks`:
        those that Dynamo has counted in this process since this object was made. One graph is asked for, so a break in
        this module is an error and shows as `fallback`; more than that one come from other code that is compiled.
        """
        return {
            "graphs": self._graphs,
            "recompiles": max(self._graphs - max(len(self._met), 1), 0),
            "graph_breaks": _graph_breaks() - self._breaks_before,
            "seconds": self._seconds,
            "fallback": self.fallback,
        }

    def changed(self) -> bool:
        """Whether something was compiled, or failed to be, since this was last asked."""
        changed, self._changed = self._changed, False
        return changed

    def _first_call(self, arguments, keywords):
        with self._waiting:
            self._waiting.enter_context(self._paused())
            try:
                result = self._run(*arguments, **keywords)
            except _OnAnotherRankError:
                pass
            except TorchDynamoException as error:
                # Once the ranks have agreed, compiled code has run, and this is an error of the step.
                if self._agreed:
                    raise
                self._seconds += time.perf_counter() - self._began
                self._agree(_reason(error))
                if isinstance(_cause(error), torch.OutOfMemoryError | MemoryError):
                    raise _cause(error) from None
            else:
                if not self._agreed:
                    self._agree("torch.compile compiled nothing; is it switched off (TORCHDYNAMO_DISABLE)?")
                return result
        return self._run(*arguments, **keywords)

    def _agree(self, mine: str | None) -> None:
        """The one exchange of the first call; where anybody failed, the module runs as it is from now on."""
        reasons = self._world.collect(mine)
        self._agreed = self._changed = True
        others = [f"{reason} (on rank {rank})" for rank, reason in enumerate(reasons) if reason]
        if others:
            self.fallback = mine or others[0]
            self._run = self._module
        self._waiting.close()

    def _inductor(self, graph: torch.fx.GraphModule, inputs: list):
        """The backend that torch.compile calls once for each graph."""
        backward_too = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
        with self._paused(), backward_too, torch.compiler.config.patch(cache_key_tag=cache_tag()):
            try:
                # Looked up here: it imports Inductor, which is a failure of the compiler where that fails.
                compiled = torch._dynamo.lookup_backend("inductor")(graph, inputs)
            except SkipFrame as error:
                # Dynamo would run the frame eagerly and say nothing.
                raise RuntimeError(f"Inductor refuses the graph: {error}") from error
        waits = True

        def run(*values):
            nonlocal waits
            if waits:
                waits = False
                self._first_run()
            return compiled(*values)

        return run

    def _first_run(self):
        """A new graph and its guards are ready, and nothing of it has run."""
        self._seconds += time.perf_counter() - self._began
        self._graphs += 1
        self._met |= {self._size} & self._planned
        self._changed = True
        if not self._agreed:
            self._agree(None)
            if self.fallback:
                raise _OnAnotherRankError


@functools.cache
def cache_tag() -> str:
    """The part of the key of torch's compile caches that changes with the version of fastsiam and with its kernels.

    The key is made from the forward graph, where an operator of ours is a name (torch 2.14, pytorch issue 144344): with
    another backward the gradient compiled before would be found, as long as the cache's folder lives. A tag that the
    user has set (TORCH_COMPILE_CACHE_KEY_TAG) stays in front.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"{torch.compiler.config.cache_key_tag}fastsiam-{fastsiam.__version__}-{digest.hexdigest()[:16]}"


class _OnAnotherRankError(Exception):
    """Leaves the compiled frame before its first kernel."""


def _graph_breaks():
    return sum(counters["graph_break"].values())


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    return error


def _reason(error):
    cause = _cause(error)
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0].strip()}" if lines else type(cause).__name__
