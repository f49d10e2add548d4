"""The training steps that `benchmarks.distributed` times: ours, and the other ways to reduce its gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from benchmarks.peers import AbsentError
from benchmarks.variants.step import Forward, Switches
from fastsiam.config import Config
from fastsiam.errors import UserError
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer
from fastsiam.runtime.device import autocast
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.step import TrainingStep, data_parallel

ONE_GRAPH, PIECES = "one graph", "pieces"
# DDP's default; its first bucket holds 1 MiB.
BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Way:
    """How a row computes, and what its ranks exchange."""

    compiled: str | None = None
    """one graph, DDP around it; or pieces: DDP's optimiser cuts the graph at the bounds of buckets."""
    statistics: str = "all ranks"
    """Those of batch norm, per view: of all ranks, of one rank, or SyncBatchNorm: of all ranks, by that class."""
    gradients: bool = True
    """DDP averages them."""


class Step:
    """One step on this rank's views [2N, 3, S, S]; its loss is returned, not read."""

    def __init__(self, module: nn.Module, run: Callable, graphs: Callable[[], int], way: Way):
        self.module, self.compiles = module, way.compiled is not None
        self.graphs = graphs
        """How many graphs have been compiled."""
        self._run = run

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        try:
            return self._run(views)
        except UserError as error:
            raise AbsentError(str(error)) from error

    def check(self) -> None:
        """Raise `AbsentError` after a step that should have been compiled, and was not."""
        if self.compiles and not self.graphs():
            raise AbsentError("torch.compile has compiled nothing")


def build_step(way: Way, config: Config, device: torch.device, dtype: torch.dtype, world: World) -> Step:
    """The step of a new model, the same on all ranks; raises `AbsentError` for what this device cannot do."""
    if way.statistics == "SyncBatchNorm" and device.type != "cuda":
        raise AbsentError("torch.nn.SyncBatchNorm needs a CUDA device")
    torch.manual_seed(config.train.seed)
    if way.statistics == "SyncBatchNorm":
        # View by view through plain layers: that class has no statistics per view.
        config = config.with_values({"model.bn_statistics": "joint"})
        method = nn.SyncBatchNorm.convert_sync_batchnorm(build_method(config))
    else:
        method = build_method(config, world.size if way.statistics == "all ranks" else 1)
    method.to(device)
    if config.train.channels_last:
        method.to(memory_format=torch.channels_last)
    if way.statistics == "SyncBatchNorm" or way.compiled == PIECES:
        return _around_ddp(way, method, config, device, dtype)
    optimizer = build_optimizer(method, config)
    runtime = Runtime(world if way.gradients else World(), device, dtype, way.compiled == ONE_GRAPH)
    # As inside a Runtime's block.
    torch._dynamo.config.optimize_ddp = False
    step = TrainingStep(method, optimizer, config, runtime)
    compiled = step.compiled
    return Step(
        method,
        lambda views: step(views, 1)["loss"].detach(),
        lambda: compiled.report()["graphs"] if compiled else 0,
        way,
    )


def _around_ddp(way, method, config, device, dtype):
    """DDP around the plain method, and the compiler, if asked for, around DDP: the order that DDP's optimiser needs."""
    module = Forward(method, Switches(forward="two_calls", loss="fused")) if way.compiled is None else method
    forward = data_parallel(module)
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    if way.compiled:
        forward = torch.compile(forward, backend=backend)
    optimizer = build_optimizer(method, config)
    precision = autocast(device, dtype)

    def run(views):
        optimizer.zero_grad()
        # Off for the whole process otherwise.
        with torch._dynamo.config.patch(optimize_ddp=True), precision():
            try:
                out = forward(views)
            except TorchDynamoException as error:
                raise AbsentError(f"torch.compile(DDP(method)): {str(error).splitlines()[0]}") from error
        loss = out["loss"] if isinstance(out, dict) else out
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Step(method, run, lambda: graphs, way)


def all_reduce(count: int, device: torch.device) -> Callable[[int], None]:
    """A function that sums `count` fp32 zeros over all ranks, in DDP's buckets, and waits for them on a CPU."""
    buckets = torch.zeros(count, device=device).split(BUCKET_BYTES // 4)

    def run(index):
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()

    return run
