"""torch.compile with a counter, and a look at what it needs before `train.compile=auto` chooses it."""

import contextlib
import functools
import hashlib
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import fastsiam
from fastsiam.errors import UserError


def eager_reason(device: torch.device) -> str | None:
    """Reason for which train.compile=auto does not compile for `device` on this machine, or None."""
    if device.type != "cuda":
        return "compiles for CUDA only"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler: install g++, or set CXX"
    return None


class Compiled:
    """Module compiled as one graph by Inductor, forward and backward; called like the module.

    Raises `UserError` where the compiler fails. Out of memory and errors of the running step are raised as they are.
    """

    def __init__(self, module: nn.Module, *, sizes: tuple = (), paused: Callable = contextlib.nullcontext):
        """Compile on the first call, and again for a new shape.

        `sizes`: sides of the groups of views at each stage of a run; several stages get a graph of static shapes each,
        which is not a recompilation. `paused()`: context (of the watchdog) in which each compilation runs.
        """
        self._planned = set(sizes) if len(sizes) > 1 else set()
        # With None the second shape would get a graph for shapes of any size.
        dynamic = False if self._planned else None
        self._run = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=self._inductor)
        self._paused = paused
        self._met: set[tuple[int, ...]] = set()
        self._sides, self._began = (), 0.0
        self._graphs, self._reported, self._seconds = 0, 0, 0.0

    def __call__(self, views: list[torch.Tensor]):
        self._began = time.perf_counter()
        if self._planned:
            self._sides = tuple(group.shape[-1] for group in views)
        try:
            result = self._run(views)
        except RuntimeError as error:
            # Imported here: it takes a second, which a run that does not compile need not wait.
            from torch._dynamo.exc import TorchDynamoException

            if self._graphs and not isinstance(error, TorchDynamoException):
                raise
            raise _refusal(error) from error
        if not self._graphs:
            raise _refusal(RuntimeError("nothing was compiled; is TORCHDYNAMO_DISABLE set?"))
        return result

    def report(self) -> dict:
        """Fields of a `compile` line in metrics.jsonl.

        `graphs`: compilations; `recompiles`: those beyond the first, or beyond the first of each size; `seconds`: from
        the calls until their graphs were compiled, tracing included.
        """
        recompiles = max(self._graphs - max(len(self._met), 1), 0)
        return {"graphs": self._graphs, "recompiles": recompiles, "seconds": self._seconds}

    def take_news(self) -> dict | None:
        """`report()`, where something was compiled since this was last called; else None."""
        if self._graphs == self._reported:
            return None
        self._reported = self._graphs
        return self.report()

    def _inductor(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        """Compile one graph; torch.compile's backend."""
        # The backward is compiled here too, in the pause and before the first kernel runs, not at the first backward().
        backward_too = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
        tagged = torch.compiler.config.patch(cache_key_tag=cache_tag())
        with self._paused(), backward_too, tagged, keeping_block_inputs():
            compiled = torch._inductor.compile(graph, inputs)
        self._seconds += time.perf_counter() - self._began
        self._graphs += 1
        self._met |= {self._sides} & self._planned
        return compiled


def keeping_block_inputs() -> contextlib.AbstractContextManager:
    """Context of a compilation that keeps the inputs of checkpointed blocks (`kept_activations`)."""
    # Imported here: Inductor takes a second.
    from fastsiam.runtime.kept_activations import KeepBlockInputs

    return torch._inductor.config.patch(joint_custom_post_pass=KeepBlockInputs())


@functools.cache
def cache_tag() -> str:
    """Tag in the key of torch's compile caches that changes with the version of fastsiam and with its kernels.

    The key is made from the forward graph, where an operator of ours is a name (torch 2.14, pytorch issue 144344): with
    another backward the gradient compiled before would be found, as long as the cache's folder lives. A tag that the
    user has set (TORCH_COMPILE_CACHE_KEY_TAG) stays in front.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(fastsiam.__file__).with_name("kernels").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"{torch.compiler.config.cache_key_tag}fastsiam-{fastsiam.__version__}-{digest.hexdigest()[:16]}"


def _refusal(error: BaseException) -> BaseException:
    """One sentence on why the compiler failed, or the error itself where memory did not suffice."""
    while (cause := getattr(error, "inner_exception", None)) is not None:
        error = cause
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return error
    reason = textwrap.shorten(f"{type(error).__name__}: {error}".partition("\n")[0], 90, placeholder="...")
    return UserError(f"train.compile: torch.compile failed ({reason}); set train.compile=off", "compile-failed")
