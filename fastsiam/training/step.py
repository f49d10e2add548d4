"""The training step: forward, backward, the ranks' gradients averaged, the weights moved. Nothing is read back."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastsiam.config import Config
from fastsiam.errors import UserError
from fastsiam.runtime.compile import Compiled
from fastsiam.runtime.device import autocast, out_of_memory_advice
from fastsiam.runtime.distributed import World

_NEVER = 2**62


@dataclass(frozen=True)
class Reading:
    """What a look at the device brings back."""

    loss: float
    """Of the last step, the mean over all ranks."""
    first_bad_step: int | None
    """The first step whose loss was not finite on any rank, if there was one."""
    guilty: bool
    """It was not finite on this rank."""
    skipped_steps: int
    """Whose gradients overflowed fp16."""


class TrainingStep:
    """One step of a method on this rank's views; all ranks hold the same weights after it."""

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
        *,
        compiling: Callable | None,
    ):
        """`method` is on the device already. `compiling()` is a context for the time that a compilation takes; None
        does not compile.
        """
        self.method, self.optimizer, self._world = method, optimizer, world
        views = config.views
        self._batch_size, self._num_views, self._full_size = config.train.batch_size, views.count, views.full_size
        self._grows = len(views.sizes) > 1
        self.compiled = Compiled(method, sizes=views.sizes, paused=compiling) if compiling else None
        self._forward = self.compiled or method
        if world.size > 1:
            self._forward = _averaging_gradients(method, self._forward)
        self._precision = autocast(device, dtype)
        self._scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
        self._first_bad = torch.full((), _NEVER, device=device)
        self._skipped = torch.zeros(1, device=device)
        if self._scaler:
            self.optimizer.register_step_pre_hook(self._count_skipped)

    def __call__(self, views: torch.Tensor, number: int) -> dict:
        """Step `number` on views [V*N, 3, S, S]; raises `UserError` with advice where memory does not suffice."""
        try:
            return self.attempt(views, number)
        except torch.OutOfMemoryError:
            pass
        # Outside the handler: the traceback would hold the activations of the step that did not fit.
        raise self._does_not_fit(views)

    def rehearse_growth(self, dtype: torch.dtype) -> None:
        """On a GPU, where views begin smaller: forward and backward of blank views of their full size.

        Nothing of it stays, but where memory does not suffice, `UserError` says so now rather than after most of the
        run. `dtype`: of the views.
        """
        if self._grows and self._first_bad.is_cuda:
            self.rehearse(dtype)

    def rehearse(self, dtype: torch.dtype) -> None:
        """See `rehearse_growth`; on any device."""
        before = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        share = self._batch_size // self._world.size
        blank = torch.zeros(0, dtype=dtype, device=self._first_bad.device)
        if not self._reaches_backward(blank, share):
            raise self._does_not_fit(blank)
        self.optimizer.zero_grad()
        for name, buffer in self.method.named_buffers():
            buffer.copy_(before[name])

    def attempt(self, views: torch.Tensor, number: int, forward: Callable | None = None) -> dict:
        """The step, where torch's own error may say that memory does not suffice.

        `forward`: in place of the compiled method, or of the one that averages gradients.
        """
        self.optimizer.zero_grad()
        with self._precision():
            out = (forward or self._forward)(views)
        loss = out["loss"]
        if self._scaler:
            self._scaler.scale(loss).backward()
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        finite = torch.isfinite(loss.detach())
        self._first_bad = torch.where(finite, self._first_bad, self._first_bad.clamp(max=number))
        return out

    def read(self, loss: torch.Tensor) -> Reading:
        """Waits for the device; all ranks must ask."""
        mine = loss.item(), self._first_bad.item(), self._skipped.item()
        losses, bad, skipped = zip(*self._world.collect(mine), strict=True)
        first = min(bad)
        return Reading(
            loss=sum(losses) / len(losses),
            first_bad_step=None if first == _NEVER else first,
            guilty=first != _NEVER and mine[1] == first,
            skipped_steps=int(skipped[0]),
        )

    def state_dict(self) -> dict:
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler else None,
            "skipped_steps": int(self._skipped.item()),
        }

    def load_state_dict(self, saved: dict) -> None:
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        # A run that is resumed in fp16 may have been trained in another precision before.
        if self._scaler and saved["scaler"]:
            self._scaler.load_state_dict(saved["scaler"])
        self._skipped.fill_(saved["skipped_steps"])

    def _count_skipped(self, optimizer, *_):
        self._skipped += optimizer.found_inf

    def _reaches_backward(self, like, share):
        try:
            with self._precision():
                loss = self._forward(self._blank_views(like, share))["loss"]
            loss.backward()
        except torch.OutOfMemoryError:
            return False
        return True

    def _does_not_fit(self, like):
        fits = (lambda batch_size: self._fits(like, batch_size)) if self._world.size == 1 else None
        return UserError(out_of_memory_advice(self._batch_size, fits))

    def _blank_views(self, like, batch_size):
        """Of the full size, with the dtype and device of `like`."""
        side = self._full_size
        views = like.new_zeros(self._num_views * batch_size, 3, side, side)
        return views.contiguous(memory_format=torch.channels_last)

    def _fits(self, like, batch_size):
        """Tried as it is: to compile for each batch takes minutes, and what fits uncompiled fits compiled as well."""
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        try:
            self.attempt(self._blank_views(like, batch_size), _NEVER, self.method)
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


def _averaging_gradients(method, forward):
    """DDP around the compiled method; synchronised batch norm keeps the buffers of all ranks equal."""
    return data_parallel(_Forward(method, forward))


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """DDP that averages gradients and leaves buffers alone."""
    # torch 2.14 has renamed it, and warns of the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{buffers: False})
