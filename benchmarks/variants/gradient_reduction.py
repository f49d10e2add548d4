"""Steps of `benchmarks.distributed`: the product's, and other ways to share statistics and reduce gradients."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from benchmarks.harness.product import ProductRun
from benchmarks.peers import AbsentError
from benchmarks.variants.step import Forward, Switches
from fastsiam.config import Config
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.step import TrainingStep, data_parallel

ONE_GRAPH, PIECES = "one graph", "pieces"
# DDP's default; its first bucket holds 1 MiB.
BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Way:
    """Computation of a row, and the exchange between its ranks."""

    compiled: str | None = None
    """one graph, with DDP around it; or pieces: DDP's optimiser cuts the graph at the bounds of buckets."""
    statistics: str = "all ranks"
    """Batch norm's, per view: of all ranks, of one rank, or SyncBatchNorm: of all ranks, by that class."""
    gradients: bool = True
    """True where DDP averages them."""


@dataclass
class Step:
    """Step on this rank, a function of a call's number; nothing is read back from the device."""

    run: Callable[[int], object]
    module: nn.Module | None = None
    graphs: Callable[[], int] = lambda: 0
    """Returns the number of graphs compiled so far."""
    first_seconds: float = 0.0
    """The slowest rank's first step; compilation is part of it, with empty caches."""
    seconds: float = 0.0
    """The slowest rank's second step."""


def build_product(way: Way, config: Config, runtime: Runtime, stack: contextlib.ExitStack) -> Step:
    """Opens a run of the product, which ends with `stack`, on its own synthetic batch; all ranks must call."""
    config = config.with_values({"train.compile": "on" if way.compiled else "off"})
    run = stack.enter_context(ProductRun(config, runtime.world))
    return Step(run, run.parts.step.method, lambda: _graphs(run.parts.step))


def build_step(way: Way, config: Config, runtime: Runtime, views: list[torch.Tensor]) -> Step:
    """Builds the step of a new model, the same on all ranks, on this rank's `views`, each [2N, 3, S, S].

    Raises `AbsentError` for what this device cannot do.
    """
    if way.statistics == "SyncBatchNorm" and runtime.device.type != "cuda":
        raise AbsentError("torch.nn.SyncBatchNorm needs a CUDA device")
    torch.manual_seed(config.train.seed)
    if way.statistics == "SyncBatchNorm":
        # View by view through plain layers: that class has no statistics per view.
        method = build_method(config.with_values({"model.bn_statistics": "joint"}))
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    else:
        method = build_method(config, runtime.world.size if way.statistics == "all ranks" else 1)
    method.to(runtime.device)
    if config.train.channels_last:
        method.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(method, config)
    if way.statistics == "SyncBatchNorm" or way.compiled == PIECES:
        call, graphs = _around_ddp(way, method, optimizer, runtime)
    else:
        world, compiles = runtime.world if way.gradients else World(), way.compiled == ONE_GRAPH
        step = TrainingStep(method, optimizer, config, Runtime(world, runtime.device, runtime.dtype, compiles, {}))
        call, graphs = (lambda batch: step([batch], 1)), (lambda: _graphs(step))

    def run(index):
        with torch._dynamo.config.patch(optimize_ddp=way.compiled == PIECES):
            call(views[index % len(views)])

    return Step(run, method, graphs)


def _graphs(step):
    return step.compiled.report()["graphs"] if step.compiled else 0


def _around_ddp(way, method, optimizer, runtime):
    """DDP around the plain method, and the compiler, if any, around DDP: the order that DDP's optimiser needs."""
    module = Forward(method, Switches(forward="two_calls", loss="fused")) if way.compiled is None else method
    forward = data_parallel(module)
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    if way.compiled:
        forward = torch.compile(forward, backend=backend)

    def step(views):
        optimizer.zero_grad()
        with runtime.autocast():
            try:
                out = forward([views] if way.compiled else views)
            except TorchDynamoException as error:
                raise AbsentError(f"torch.compile(DDP(method)): {str(error).splitlines()[0]}") from error
        (out["loss"] if isinstance(out, dict) else out).backward()
        optimizer.step()

    return step, lambda: graphs


def all_reduce(count: int, device: torch.device) -> Callable[[int], None]:
    """Returns a function that sums `count` fp32 zeros over all ranks, in DDP's buckets, and waits for them on a CPU."""
    buckets = torch.zeros(count, device=device).split(BUCKET_BYTES // 4)

    def run(index):
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()

    return run
