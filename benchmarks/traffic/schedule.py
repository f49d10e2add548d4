"""Inductor's schedule of a function's forward and backward for a GPU that is not there.

Dynamo and AOTAutograd trace on the CPU, because autograd refuses fake CUDA tensors without a driver (torch 2.14:
"hasPrimaryContext expects a valid device index"). The graphs that they hand over are moved to CUDA before Inductor
sees them; its own passes, lowering, fusion and order are those of a GPU.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch._functorch.config
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.traffic.count import Launch, launches_of, peak_of
from benchmarks.traffic.gpus import Gpu
from benchmarks.traffic.pretended import CUDA, kernels_chosen, pretended


@dataclass
class Schedule:
    """What the GPU would do in one call and its backward."""

    launches: list[Launch] = field(default_factory=list)
    saved_bytes: int = 0
    """Tensors that the forward keeps for the backward, besides parameters and inputs."""
    peak_bytes: int = 0
    """The most at one time of these and of what forward or backward allocate, besides parameters and inputs."""


class _Scheduled(Exception):
    """Raised in place of running what was scheduled."""


def schedule(call: Callable, inputs: tuple, gpu: Gpu, dtype: torch.dtype = torch.bfloat16) -> Schedule:
    """Schedules `call(*inputs)`, a function or module on the CPU, and its backward, under autocast to `dtype`.

    The result of `call` must need gradients. Code that asks a tensor whether it is on CUDA hears yes.
    """
    found = Schedule()
    torch._dynamo.reset()
    backend = functools.partial(_backend, gpu=gpu, found=found)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    # What the cache finds again is not scheduled.
    patches = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}
    mixed = dtype != torch.float32
    with (
        torch._functorch.config.patch(patches),
        torch.autocast("cpu", dtype, enabled=mixed),
        kernels_chosen(),
        contextlib.suppress(_Scheduled),
    ):
        compiled(*inputs)
    torch._dynamo.reset()
    return found


def _backend(graph: torch.fx.GraphModule, inputs: list, *, gpu: Gpu, found: Schedule):
    return compile_fx.compile_fx(graph, inputs, inner_compile=functools.partial(_compile, gpu=gpu, found=found))


def _compile(graph: torch.fx.GraphModule, inputs: list, *, gpu: Gpu, found: Schedule, **options):
    backward = options.get("is_backward", False)
    with pretended(gpu):
        _schedule_graph(graph, inputs, backward, found)

    def run(*arguments):
        raise _Scheduled

    return run


def _schedule_graph(graph, inputs, backward, found):
    fake_mode = torch._guards.detect_fake_mode(inputs)
    inputs = _moved(graph, fake_mode)
    with V.set_fake_mode(fake_mode), V.set_debug_handler(DebugContext()), torch.no_grad():
        compile_fx.view_to_reshape(graph)
        FakeTensorProp(graph, fake_mode).propagate_dont_convert_inputs(*inputs)
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=False, is_backward=backward)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            found.launches += launches_of(lowering, backward)
            found.peak_bytes = max(found.peak_bytes, peak_of(lowering))
    if backward:
        found.saved_bytes = sum(_saved(node) for node in graph.graph.find_nodes(op="placeholder"))


def _moved(graph, fake_mode):
    """The inputs of `graph` as fake tensors on CUDA, where its constants are made too from now on."""
    for node in graph.graph.nodes:
        node.args = tuple(CUDA if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {name: CUDA if isinstance(value, torch.device) else value for name, value in node.kwargs.items()}
    graph.recompile()
    inputs = []
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            with fake_mode:
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        inputs.append(value)
    return inputs


def _saved(node):
    value = node.meta["val"]
    if node.name.startswith(("primals_", "tangents_")) or not isinstance(value, torch.Tensor):
        return 0
    return value.numel() * value.itemsize
