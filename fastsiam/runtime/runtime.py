"""The processes, device, precision and compiler setting of a run: chosen once, and in force inside a `with` block."""

import contextlib
from dataclasses import dataclass, field

import torch

from fastsiam.config.schema import TrainConfig
from fastsiam.runtime import malloc
from fastsiam.runtime.compile import eager_reason
from fastsiam.runtime.device import DTYPES, autocast, choose_compile, choose_device, choose_precision, multiplies_bf16
from fastsiam.runtime.distributed import World

_AS_BEFORE = "auto: as in the checkpoint"


@dataclass(frozen=True)
class Runtime:
    """Processes, device and precision of a run. PyTorch and malloc are set for it inside the block, and put back after.

    The settings are CUDA's current device, cuDNN's search for the fastest algorithm, DDP's splitting of compiled
    graphs, the memory that malloc keeps, and torch's random state.
    """

    world: World
    device: torch.device
    dtype: torch.dtype
    compiles: bool
    reasons: dict[str, str] = field(default_factory=dict)
    """In words, of those of `device`, `dtype` and `compile` that the config leaves open."""
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, settings: TrainConfig, world: World | None = None, before: dict | None = None) -> "Runtime":
        """Decide the `train` section of a config for this machine.

        `world`: the ranks, which have joined; None for this process alone. `before`: the `names` of the checkpoint
        that a run resumes from, as far as it holds them. Where the config says auto, its precision is kept if this
        machine computes it natively, and its compiler setting if the device is of the same type. Raises `UserError`
        as `choose_device` does.
        """
        world, before = world or World(), before or {}
        device = choose_device(settings.device, world.device_rank, world.device_ranks)
        precision, compiling = settings.precision, settings.compile
        reasons = {}
        if settings.device == "auto":
            reasons["device"] = "auto: CUDA device found" if device.type == "cuda" else "auto: no CUDA device"
        if precision == "auto":
            native = multiplies_bf16(device)
            reasons["dtype"] = "auto: bf16 in hardware" if native else "auto: no bf16 in hardware"
            if "dtype" in before and (before["dtype"] != "bf16" or native):
                precision, reasons["dtype"] = before["dtype"], _AS_BEFORE
        if compiling == "auto":
            reasons["compile"] = eager_reason(device) or "auto: CUDA, Triton and a C++ compiler found"
            if "compile" in before and before.get("device") == device.type:
                compiling, reasons["compile"] = "on" if before["compile"] else "off", _AS_BEFORE
        return cls(world, device, choose_precision(precision, device), choose_compile(compiling, device), reasons)

    @property
    def names(self) -> dict:
        """`device` (cpu, cuda), `dtype` (bf16, fp16, fp32) and `compile` (bool), as checkpoints hold them."""
        dtype = next(name for name, known in DTYPES.items() if known == self.dtype)
        return {"device": self.device.type, "dtype": dtype, "compile": self.compiles}

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        return autocast(self.device, self.dtype)()

    def __enter__(self) -> "Runtime":
        with contextlib.ExitStack() as undo:
            undo.callback(torch.set_rng_state, torch.get_rng_state())
            _set(undo, torch.backends.cudnn, "benchmark", self.device.type == "cuda")
            if self.device.type == "cuda":
                undo.callback(torch.cuda.set_device, torch.cuda.current_device())
                torch.cuda.set_device(self.device)
            elif malloc.keep_freed():
                undo.callback(malloc.give_back_freed)
            if self.compiles and self.world.size > 1:
                # It would cut the one graph of a step; buffers are alike on all ranks, for their statistics are.
                _set(undo, torch._dynamo.config, "optimize_ddp", False)
            self._exit.push(undo.pop_all())
        return self

    def __exit__(self, *error) -> None:
        self._exit.__exit__(*error)


def _set(undo, owner, name, value):
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
