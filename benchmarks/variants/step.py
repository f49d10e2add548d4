"""Training steps of `benchmarks.step`: the authors', then ours with one more switch in each row."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastsiam
from benchmarks.peers import AbsentError, authors
from fastsiam.config import Config
from fastsiam.data.build import build_loader
from fastsiam.kernels import negative_cosine
from fastsiam.kernels.reference import negative_cosine_ref
from fastsiam.models.convolution import multiplies_tiles, use_products
from fastsiam.optim.build import build_optimizer
from fastsiam.runtime.device import autocast, choose_compile

INPUT_SETS = 2


@dataclass(frozen=True)
class Switches:
    """Switches of a row."""

    precision: str = "fp32"
    channels_last: bool = False
    forward: str = "authors"
    """authors, lightly, solo-learn: their modules. two_calls, one_call: ours, the encoder called once a view, or once
    for both with batch-norm statistics per view."""
    loss: str = "plain"
    """plain: a few torch operations; fused: the kernel."""
    compile: str | None = None
    """The mode of torch.compile(fullgraph=True)."""
    optimizer: str = "default"
    """default: torch.optim.SGD as it comes; fused: torch's fused kernel; apex: NVIDIA's FusedSGD."""
    memory: str = "default"
    """kept: memory that a step frees stays with the process, which is a matter of the whole process."""
    convolutions: str = "torch"
    """products: matrix products where those are faster, on a CPU with AMX."""
    norms: str = "kernels"
    """kernels: batch norm, joins and ReLU by ours where they take them; torch: on a CPU as without them."""


def product(device: torch.device, dtype: torch.dtype) -> Switches:
    """Returns what `fastsiam.train` turns on by itself on this device."""
    return Switches(
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        channels_last=True,
        forward="one_call",
        loss="fused" if device.type == "cuda" else "plain",
        compile="default" if choose_compile("auto", device) else None,
        optimizer="fused",
        memory="kept" if device.type == "cpu" else "default",
        convolutions="products" if _multiplies_tiles(device, dtype) else "torch",
    )


def _multiplies_tiles(device, dtype):
    return device.type == "cpu" and dtype == torch.bfloat16 and multiplies_tiles()


def ablation(device: torch.device, dtype: torch.dtype) -> dict[str, Switches]:
    """Each row has the switches of the row above and one more; the compiler's other ways stand beside `+ compile`.

    The optimizers stand on what the product compiles on this device: the last rung has the product's switches.
    """
    cuda = device.type == "cuda"
    norms = "kernels" if cuda else "torch"
    rows = {"authors": Switches(norms=norms)}

    def add(name, base, **changes):
        rows[name] = dataclasses.replace(base, **changes)
        return rows[name]

    last = rows["authors"]
    if dtype == torch.bfloat16:
        last = add("+ bf16", last, precision="bf16")
    last = add("+ channels-last", last, channels_last=True)
    last = add("+ two calls in one callable", last, forward="two_calls")
    last = add("+ one call", last, forward="one_call")
    if cuda:
        last = add("+ fused loss", last, loss="fused")
    compiled = add("+ compile", last, compile="default")
    add("compile, two calls", compiled, forward="two_calls")
    if cuda:
        add("compile max-autotune", compiled, compile="max-autotune-no-cudagraphs")
        add("compile with CUDA graphs", compiled, compile="reduce-overhead")
    last = add("+ fused SGD", product(device, dtype), memory="default", convolutions="torch", norms=norms)
    if cuda:
        add("apex FusedSGD", last, optimizer="apex")
    else:
        last = add("+ freed memory kept", last, memory="kept")
        last = add("+ batch norm by kernels", last, norms="kernels")
    if _multiplies_tiles(device, dtype):
        add("+ convolutions by matrix products", last, convolutions="products")
    return rows


class Forward(nn.Module):
    """Forward of the method with the encoder called for all views at once or view by view, and either loss."""

    def __init__(self, method: nn.Module, switches: Switches):
        super().__init__()
        self.method, self.two_calls = method, switches.forward == "two_calls"
        self.loss = negative_cosine if switches.loss == "fused" else negative_cosine_ref

    def forward(self, views):
        """`views`: [2N, 3, S, S], the first views and then the second ones; returns the loss."""
        if self.two_calls:
            z1, z2 = (self.method.embed(x) for x in views.chunk(2))
            p1, p2 = self.method.predictor(z1), self.method.predictor(z2)
        else:
            z = self.method.embed(views)
            p1, p2 = self.method.predictor(z).chunk(2)
            z1, z2 = z.chunk(2)
        return self.loss(p1, p2, z1, z2)


def build_ablated(switches: Switches, config: Config, weights: dict, device: torch.device) -> Callable:
    """Builds the step with these switches, on a new copy of the model."""
    precision = autocast(device, torch.bfloat16 if switches.precision == "bf16" else torch.float32)
    memory_format = torch.channels_last if switches.channels_last else torch.contiguous_format
    if switches.forward == "authors":
        return authors.build_step(config, weights, device, precision=precision, memory_format=memory_format)
    # The plain layers see one view a call: their statistics are per view by themselves.
    statistics = "joint" if switches.forward == "two_calls" else "per_view"
    method = fastsiam.build_method(config.with_values({"model.bn_statistics": statistics})).to(device)
    if switches.convolutions == "products":
        use_products(method.encoder)
    if switches.norms == "torch" and device.type == "cpu":
        for layer in method.modules():
            # The kernels take layers that have one.
            if getattr(layer, "counter", None) is not None:
                layer.counter = None
    method.load_state_dict(weights)
    method.to(memory_format=memory_format)
    forward = Forward(method, switches)
    if switches.compile:
        mode = None if switches.compile == "default" else switches.compile
        forward = torch.compile(forward, fullgraph=True, mode=mode)
    optimizer = build_sgd(switches.optimizer, method, config)

    def step(views):
        if switches.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        # apex's takes no argument.
        optimizer.zero_grad()
        with precision():
            loss = forward(views)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.model = method
    return step


def build_sgd(implementation: str, method: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Builds the product's parameter groups and numbers in one of three implementations."""
    chosen = "apex" if implementation == "apex" else "torch"
    try:
        optimizer = build_optimizer(method, config.with_values({"optimizer.implementation": chosen}))
    except ImportError as error:
        raise AbsentError(str(error)) from error
    if implementation != "default":
        return optimizer
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    return torch.optim.SGD(groups, **{key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay")})


def initial_weights(config: Config, device="cpu") -> dict[str, torch.Tensor]:
    """Returns the weights with which a run of this config starts."""
    torch.manual_seed(config.train.seed)
    return fastsiam.build_method(config).to(device).state_dict()


class Inputs:
    """Different synthetic batches [2N, 3, S, S], cast once for all rows that want them so."""

    def __init__(self, config: Config, device: torch.device):
        self._views = []
        for seed in range(INPUT_SETS):
            loader = build_loader(config.with_values({"train.seed": seed}), device=device)
            self._views.append(next(loader.epoch(0)).views[0])
        self.like = functools.cache(self._like)

    def _like(self, dtype: torch.dtype, memory_format: torch.memory_format) -> list[torch.Tensor]:
        return [
            views.to(dtype, memory_format=memory_format).contiguous(memory_format=memory_format)
            for views in self._views
        ]

    def of(self, switches: Switches) -> list[torch.Tensor]:
        """Returns batches as the row's own loader would deliver them: only ours casts."""
        ours = switches.forward in ("one_call", "two_calls") and switches.precision == "bf16"
        memory_format = torch.channels_last if switches.channels_last else torch.contiguous_format
        return self.like(torch.bfloat16 if ours else torch.float32, memory_format)
