"""The training step: forward, backward, the ranks' gradients averaged, the weights moved. Nothing is read back."""

import contextlib
import inspect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastsiam.config import Config
from fastsiam.config.micro_batch import micro_batch_sizes
from fastsiam.errors import UserError
from fastsiam.models.convolution import use_products
from fastsiam.runtime.compile import Compiled
from fastsiam.runtime.device import out_of_memory_advice
from fastsiam.runtime.runtime import Runtime
from fastsiam.runtime.seeding import seed_step
from fastsiam.training.average import EncoderAverage
from fastsiam.training.micro_batch import micro_batch_of, together

_NEVER = 2**62


@dataclass(frozen=True)
class Reading:
    """State of the last steps, read back from the device."""

    loss: float
    """Of the last step, the mean over all ranks."""
    first_bad_step: int | None
    """The first step whose loss was not finite on any rank, if there was one."""
    bad_images: np.ndarray
    """[n] indices of the images of that step, where its loss was not finite on this rank; otherwise empty."""
    skipped_steps: int
    """Steps whose gradients overflowed fp16."""
    scalars: dict[str, float]
    """Other scalars that the method has returned in the last step, the mean over all ranks."""

    @property
    def is_nonfinite(self) -> bool:
        return self.first_bad_step is not None


class TrainingStep:
    """One step of a method on this rank's views; all ranks hold the same weights after it."""

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        runtime: Runtime,
        paused: Callable = contextlib.nullcontext,
    ):
        """`method` is on the device already. `paused()`: a context for the time that a compilation takes."""
        self.method, self.optimizer, self._runtime, self._world = method, optimizer, runtime, runtime.world
        device = runtime.device
        if device.type == "cpu":
            use_products(method.encoder)
        self._train, self._groups = config.train, config.view_groups
        self.micro_batches = config.train.batch_size // (config.train.micro_batch or config.train.batch_size)
        """How many a step has."""
        self._grows = len(config.view_stages) > 1
        self.compiled = Compiled(method, sizes=config.view_stages, paused=paused) if runtime.compiles else None
        self._forward = self.compiled or method
        if self._world.size > 1:
            self._forward = data_parallel(_Forward(method, self._forward))
        self._scaler = torch.amp.GradScaler(device.type) if runtime.dtype == torch.float16 else None
        evaluate = config.evaluate
        self.average = EncoderAverage(method.encoder, evaluate.average_decay) if evaluate.average == "ema" else None
        self._first_bad = torch.full((), _NEVER, device=device)
        self._skipped = torch.zeros(1, device=device)
        self._overflowed: torch.Tensor | None = None
        self._scalars: dict[str, torch.Tensor] = {}
        self._recent: deque[tuple[int, np.ndarray]] = deque()
        if self._scaler:
            self.optimizer.register_step_pre_hook(self._count_skipped)

    @property
    def encoder(self) -> nn.Module:
        """The encoder to evaluate and to export: the average where there is one, else the method's."""
        return self.method.encoder if self.average is None else self.average.encoder

    def __call__(
        self, views: list[torch.Tensor], number: int, indices: np.ndarray | None = None, progress: float = 0.0
    ) -> dict:
        """Step `number` on groups of views of the images `indices`; no value is read back from the device.

        `progress`: share of the run's budget used before the step.

        Raises `UserError` with advice where memory does not suffice.
        """
        if indices is not None:
            self._recent.append((number, indices))
        self.method.before_step(progress, indices)
        seed_step(self._train.seed, number, self._world.rank, self._runtime.device)
        try:
            out = self.attempt(views, number)
            self._scalars = {name: value.detach() for name, value in out.items() if not value.dim()}
            self.method.after_step(out)
            return out
        except torch.OutOfMemoryError:
            pass
        # Outside the handler: the traceback would hold the activations of the step that did not fit.
        raise self._does_not_fit(views[0])

    def rehearse_growth(self) -> None:
        """On a GPU, where views begin smaller: forward and backward of blank views of their full size.

        Leaves nothing behind. Where memory does not suffice, raises `UserError` now rather than after most of the run.
        """
        if self._grows and self._first_bad.is_cuda:
            self.rehearse()

    def rehearse(self) -> None:
        """See `rehearse_growth`; on any device."""
        before = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        self.method.before_step(0.0, np.arange(self._train.batch_size // self._world.size))
        blank = torch.zeros(0, dtype=self._runtime.dtype, device=self._runtime.device)
        if not self._reaches_backward(blank):
            raise self._does_not_fit(blank)
        self.optimizer.zero_grad()
        for name, buffer in self.method.named_buffers():
            buffer.copy_(before[name])

    def attempt(self, views: list[torch.Tensor], number: int, forward: Callable | None = None) -> dict:
        """The step, where torch's own error may say that memory does not suffice.

        `forward`: in place of the compiled method, or of the one that averages gradients.
        """
        self.optimizer.zero_grad()
        out = self._accumulate(views, forward or self._forward, range(self.micro_batches))
        self.method.after_backward()
        if self._scaler:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        if self.average is not None:
            self.average.update(number, self._overflowed)
        # The mean over micro batches is finite where each of them is.
        finite = torch.isfinite(out["loss"].detach())
        self._first_bad = torch.where(finite, self._first_bad, self._first_bad.clamp(max=number))
        return out

    def _accumulate(self, views, forward, chosen: range) -> dict:
        """Add the gradients of the `chosen` micro batches, each divided by the number of all of them."""
        outs, number_of_all = [], self.micro_batches
        for number in chosen:
            # The ranks exchange gradients once, in the last backward pass.
            waits = number != chosen[-1] and isinstance(forward, DistributedDataParallel)
            with forward.no_sync() if waits else contextlib.nullcontext():
                with self._runtime.autocast():
                    out = forward(micro_batch_of(views, number, number_of_all))
                loss = out["loss"] if number_of_all == 1 else out["loss"] / number_of_all
                (self._scaler.scale(loss) if self._scaler else loss).backward()
            outs.append(out)
        return outs[0] if number_of_all == 1 else together(outs)

    def read(self) -> Reading:
        """Wait for the device and read the state since the last reading; all ranks must call."""
        values = {name: value.item() for name, value in self._scalars.items()}
        mine = values, self._first_bad.item(), self._skipped.item()
        of_ranks, bad, skipped = zip(*self._world.collect(mine), strict=True)
        means = {name: sum(values[name] for values in of_ranks) / len(of_ranks) for name in values}
        first, images = min(bad), np.empty(0, np.int64)
        if first != _NEVER and mine[1] == first:
            images = next((indices for number, indices in self._recent if number == first), images)
        self._recent.clear()
        return Reading(
            loss=means.pop("loss"),
            first_bad_step=None if first == _NEVER else first,
            bad_images=images,
            skipped_steps=int(skipped[0]),
            scalars=means,
        )

    def state_dict(self) -> dict:
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler else None,
            "skipped_steps": int(self._skipped.item()),
            "average": None if self.average is None else self.average.encoder.state_dict(),
        }

    def load_state_dict(self, saved: dict) -> None:
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        # A run that is resumed in fp16 may have been trained in another precision before.
        if self._scaler and saved["scaler"]:
            self._scaler.load_state_dict(saved["scaler"])
        self._skipped.fill_(saved["skipped_steps"])
        if self.average is not None:
            self.average.encoder.load_state_dict(saved["average"])

    def _count_skipped(self, optimizer, *_):
        # The scaler takes it away after the step.
        self._overflowed = optimizer.found_inf
        self._skipped += optimizer.found_inf

    def _reaches_backward(self, like):
        """Two micro batches: beside the second one lie the gradients of the first."""
        try:
            self._accumulate(self._blank_views(like), self._forward, range(self.micro_batches)[:2])
        except torch.OutOfMemoryError:
            return False
        return True

    def _does_not_fit(self, like):
        whole = self.method.needs_whole_batch
        sizes = [] if whole else micro_batch_sizes(self._train.batch_size, self._world.size)
        fits = (lambda size: self._fits(like, size)) if self._world.size == 1 else None
        return UserError(out_of_memory_advice(self._train, sizes, fits), "out-of-memory")

    def _blank_views(self, like):
        """Zeros as this rank's views of the full sizes, with the dtype and device of `like`."""
        images = self._train.batch_size // self._world.size
        shapes = [(count * images, 3, spec.size, spec.size) for count, spec in self._groups]
        return [like.new_zeros(shape).contiguous(memory_format=torch.channels_last) for shape in shapes]

    def _fits(self, like, micro_batch):
        """Tried as it is: to compile for each size takes minutes, and what fits uncompiled fits compiled as well."""
        self.micro_batches = self._train.batch_size // micro_batch
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        try:
            self.attempt(self._blank_views(like), _NEVER, self.method)
        except torch.OutOfMemoryError:
            return False
        return True


class _Forward(nn.Module):
    """The parameters of a method, and its compiled form to call."""

    def __init__(self, method, call):
        super().__init__()
        self.method = method
        # In a tuple: a compiled module assigned as it is would be a second set of the same parameters.
        self._call = (call,)

    def forward(self, views):
        return self._call[0](views)


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """DDP that averages gradients and leaves buffers alone: synchronised batch norm keeps those of all ranks equal."""
    # torch 2.14 has renamed it, and warns of the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{buffers: False})
