"""Batch norm whose statistics stay per view when all views go through one forward, and are those of all ranks.

The paper calls the encoder once per view; running both views as one batch is faster and is the same model only
where each view keeps its own statistics. The same batch on several ranks is the same model only where the statistics
are those of all ranks' images. `nn.SyncBatchNorm` breaks the compiler's graph (pytorch#161302), has joint statistics
and does not run on CPUs; the functional collectives below are ops that `torch.compile(fullgraph=True)` sees.

Kernels of ours compute it for channels-last images, on CUDA and in eager mode on a CPU (`fused_norm`). Elsewhere there
are three ways. Several ranks, and one rank that compiles, take the formula written out over [V, N, C, ...]: the
compiler would write the gradients of chunks in fp32 and join them by kernels of their own (25 of 437 GB in a step of
ResNet-50 at batch 512, in Inductor's code for sm_90). In eager mode F.batch_norm is called for each chunk, or, where
that is faster, the whole encoder for each view (`view_by_view`).
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsiam.errors import UserError
from fastsiam.kernels.batch_norm import counter_of
from fastsiam.models.fused_norm import fused_norm, takes_kernels
from fastsiam.runtime.gather import of_all_ranks


def _statistics(views, world_size):
    """(mean, biased variance), [V, 1, C, 1...] each, of all ranks' images per view and channel.

    `views`: [V, N, C, ...]; the statistics are in max(fp32, its dtype). No count travels: the loader gives every rank
    the same number of images. With equal counts the formula of Chan, Golub and LeVeque (1983) is the mean of the
    variances plus the variance of the means.
    """
    views = views.to(torch.promote_types(views.dtype, torch.float32))
    local = torch.var_mean(views, dim=(1, *range(3, views.dim())), correction=0, keepdim=True)
    if world_size == 1:
        return local[1], local[0]
    variances, means = of_all_ranks(torch.stack(local), world_size).unbind(1)
    between, mean = torch.var_mean(means, dim=0, correction=0)
    return mean, variances.mean(0) + between


class _Normalize(torch.autograd.Function):
    """(views - mean) / std * weight + bias, where mean and std are functions of all ranks' views.

    The gradient to `views` is that of the sum of all ranks' losses; those to weight and bias are this rank's share.
    Written out, it keeps for backward what F.batch_norm keeps: the input in its own dtype. A ResNet-8 of width 8 on 64
    views of 16 px in bf16 keeps 4.24 MB in eager and 2.68 MB compiled, with F.batch_norm and with this; the same
    formula left to autograd keeps 11.1 and 5.4 MB.
    """

    @staticmethod
    def forward(ctx, views, mean, inverse_std, weight, bias, world_size):
        ctx.save_for_backward(views, mean, inverse_std, weight)
        ctx.world_size = world_size
        out = views - mean
        if weight is None:
            return out.mul_(inverse_std).to(views.dtype)
        channel = mean.shape[2:]
        return out.mul_(inverse_std * weight.view(channel)).add_(bias.view(channel)).to(views.dtype)

    @staticmethod
    def backward(ctx, grad):
        views, mean, inverse_std, weight = ctx.saved_tensors
        over = (1, *range(3, views.dim()))
        # Were this the forward's views - mean, the compiler would see one value used on both sides of a collective,
        # which it keeps (in fp32: 4.03 MB instead of 2.68) rather than recomputes.
        below = mean - views
        of_bias = grad.sum(over, keepdim=True, dtype=mean.dtype)
        of_weight = (grad * below).sum(over, keepdim=True) * -inverse_std
        # Gathered and added, not all-reduced: Inductor (torch 2.14) reduces in place in the buffer of the stack, which
        # of_bias and of_weight are slices of, and reads them below while the reduction is under way.
        sums = of_all_ranks(torch.stack([of_bias, of_weight]), ctx.world_size).sum(0)
        of_mean, of_std = (sums / _count(views, ctx.world_size)).unbind()
        of_views = below.mul_(of_std * inverse_std).add_(grad).sub_(of_mean)
        if weight is None:
            return of_views.mul_(inverse_std).to(views.dtype), None, None, None, None, None
        of_views = of_views.mul_(inverse_std * weight.view(mean.shape[2:])).to(views.dtype)
        of_weight, of_bias = (share.sum(0).flatten().to(weight.dtype) for share in (of_weight, of_bias))
        return of_views, None, None, of_weight, of_bias, None


def _count(views, world_size):
    """How many values of all ranks one mean is taken over."""
    return world_size * views.numel() // (views.shape[0] * views.shape[2])


@contextlib.contextmanager
def views_at_a_time(module: nn.Module, num_views: int):
    """Lets calls of `module` take batches of so many views, as long as the block lasts.

    Layers with one set of statistics over all views keep it.
    """
    with with_view_counts([(layer, num_views) for layer, count in view_counts(module) if count > 1]):
        yield


def view_counts(module: nn.Module) -> list[tuple[nn.Module, int]]:
    """Returns the batch norms in `module` with their numbers of views, for `with_view_counts`."""
    return [(layer, layer.num_views) for layer in module.modules() if isinstance(layer, _PerView)]


@contextlib.contextmanager
def with_view_counts(counts: list[tuple[nn.Module, int]]):
    """Gives layers their numbers of views as long as the block lasts."""
    before = [layer.num_views for layer, _ in counts]
    for layer, number in counts:
        layer.num_views = number
    try:
        yield
    finally:
        for (layer, _), number in zip(counts, before, strict=True):
            layer.num_views = number


def view_by_view(module: nn.Module, images: torch.Tensor, num_views: int) -> torch.Tensor:
    """Applies `module` to [V*N, ...] by one call for each view: the same function and the same gradients.

    In eager mode it spares each batch norm the join of its views, four passes over all activations. For modules whose
    statistics are per view and of one rank.
    """
    with views_at_a_time(module, 1):
        return torch.cat([module(view) for view in images.chunk(num_views)])


def gains_by_view(module: nn.Module, images: torch.Tensor) -> bool:
    """Whether `view_by_view` is the faster way to train on `images`: in eager mode on CUDA without the kernels.

    It needs statistics of one view and rank. A CPU is as fast either way.
    """
    if not images.is_cuda or torch.compiler.is_compiling() or not module.training:
        return False
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    alone = all(isinstance(layer, _PerView) and layer.world_size == 1 for layer in norms)
    return bool(norms) and alone and not takes_kernels(images, *norms)


class _PerView:
    """Mixin over a class of batch norm: `num_views` equal chunks of the batch, each normalised by itself.

    With a `world_size` above 1 a chunk is the images of all ranks: training-mode forward and backward are one
    collective each over the default process group, which has to have that size and equal batches on all ranks.
    """

    num_views: int
    world_size: int = 1
    then_relu: bool = False
    """Whether ReLU is part of the layer; the one that followed it is gone."""

    counter: torch.Tensor | None = None
    """For the kernels to count in; no state, they leave it at zero. Layers without weights have none."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.counter is not None:
            self.counter = fn(self.counter)
        return self

    def forward(self, x):
        """[V*N, C, ...] view by view; equals V calls of the plain layer, running statistics included.

        Raises `ValueError` where the batch does not divide into the views.
        """
        self._check_input_dim(x)
        if not self.training:
            out = super().forward(x)
            return torch.relu(out) if self.then_relu else out
        if x.shape[0] % self.num_views:
            raise ValueError(f"batch norm: a batch of {x.shape[0]} does not divide into {self.num_views} views")
        tail = _tail(self)
        if tail is None:
            # A forward of its own, of which nothing is known.
            return torch.cat([super(_PerView, self).forward(view) for view in x.chunk(self.num_views)])
        if takes_kernels(x, self):
            out = fused_norm([self], [x], relu=self.then_relu)
        else:
            out = self._normalised(x)
            out = torch.relu(out) if self.then_relu else out
        for layer in tail:
            out = layer(out)
        return out

    def _normalised(self, x):
        written_out = self.world_size > 1 or torch.compiler.is_compiling()
        if written_out or (self.momentum is None and self.num_batches_tracked is not None):
            return self._across_ranks(x.unflatten(0, (self.num_views, -1))).flatten(0, 1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.num_views)
        return torch.cat(
            [
                F.batch_norm(
                    view, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum or 0.0,
                    self.eps,
                )
                for view in x.chunk(self.num_views)
            ]
        )  # fmt: skip

    def _across_ranks(self, views):
        """[V, N, C, ...] normalised by all ranks' statistics, which the running ones take in, view after view."""
        mean, variance = _statistics(views.detach(), self.world_size)
        if self.num_batches_tracked is not None:
            self._take_in(mean, variance, _count(views, self.world_size))
        inverse_std = (variance + self.eps).rsqrt()
        return _Normalize.apply(views, mean, inverse_std, self.weight, self.bias, self.world_size)

    def _take_in(self, mean, variance, count):
        self.num_batches_tracked.add_(self.num_views)
        for running, new in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
            for number, of_view in enumerate(new.flatten(1).to(running.dtype), 1 - self.num_views):
                share = self.momentum
                if share is None:
                    # The running statistics are the mean over all batches, counted on the device.
                    share = (self.num_batches_tracked + number).to(running.dtype).reciprocal()
                running.lerp_(of_view, share)

    def extra_repr(self):
        return f"{super().extra_repr()}, num_views={self.num_views}, world_size={self.world_size}"


class PerViewBatchNorm1d(_PerView, nn.BatchNorm1d):
    """nn.BatchNorm1d over [V*N, C], statistics per view."""


class PerViewBatchNorm2d(_PerView, nn.BatchNorm2d):
    """nn.BatchNorm2d over [V*N, C, H, W], statistics per view."""


@functools.cache
def _per_view_class(kind: type) -> type:
    known = {nn.BatchNorm1d: PerViewBatchNorm1d, nn.BatchNorm2d: PerViewBatchNorm2d}
    return known.get(kind) or type(f"PerView{kind.__name__}", (_PerView, kind), {"__doc__": kind.__doc__})


def _tail(layer: nn.Module) -> tuple[nn.Module, ...] | None:
    """Modules that a batch norm applies to what it has normalised; None where its forward is not known."""
    kind = next(kind for kind in type(layer).__mro__ if kind is not _PerView and not issubclass(kind, _PerView))
    if kind.forward is _BatchNorm.forward:
        return ()
    # timm's, under which efficientnets, regnets, dense nets and others keep their activation.
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return layer.drop, layer.act
    return None


def split_statistics(module: nn.Module, num_views: int, world_size: int = 1) -> nn.Module:
    """Turn every batch norm inside `module` into its per-view form, in place; returns `module`.

    Those of other libraries are meant as well: every subclass of torch's. Layers that average over no batch (layer
    norm, group norm) stay. `num_views` 1 is plain statistics over the whole batch; `world_size` is the number of ranks
    that share a batch. Parameters, buffers and their names stay, so a state dict fits both forms. Raises `UserError`
    for several ranks and a batch norm with a forward of its own that is not known here.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _PerView):
            kind = type(layer)
            layer.__class__ = _per_view_class(kind)
            layer.num_views, layer.world_size = num_views, world_size
            if layer.affine:
                layer.counter = counter_of(layer.num_features, num_views, layer.weight.device)
            if world_size > 1 and _tail(layer) is None:
                raise UserError(
                    f"model.encoder: {kind.__module__}.{kind.__name__} has no statistics over several ranks; train it "
                    "in one process, or choose another encoder",
                    "norm-of-one-rank",
                )
    return module
