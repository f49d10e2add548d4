"""Batch norm whose statistics stay per view when all views go through one forward.

The paper calls the encoder once per view; running both views as one batch is faster and is the same model only
where each view keeps its own statistics.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _PerView:
    """Mixin over nn.BatchNorm1d/2d: `num_views` equal chunks of the batch, each normalised by itself."""

    num_views: int

    def forward(self, x):
        """[V*N, C, ...] view by view; equals V calls of the plain layer, running statistics included.

        Raises `ValueError` where the batch does not divide into the views.
        """
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        if x.shape[0] % self.num_views:
            raise ValueError(f"batch norm: a batch of {x.shape[0]} does not divide into {self.num_views} views")
        self.num_batches_tracked.add_(self.num_views)
        return torch.cat(
            [
                F.batch_norm(
                    view, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
                )
                for view in x.chunk(self.num_views)
            ]
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, num_views={self.num_views}"


class PerViewBatchNorm1d(_PerView, nn.BatchNorm1d):
    """nn.BatchNorm1d over [V*N, C], statistics per view."""


class PerViewBatchNorm2d(_PerView, nn.BatchNorm2d):
    """nn.BatchNorm2d over [V*N, C, H, W], statistics per view."""


_PER_VIEW = {nn.BatchNorm1d: PerViewBatchNorm1d, nn.BatchNorm2d: PerViewBatchNorm2d}


def split_statistics(module: nn.Module, num_views: int) -> nn.Module:
    """Turn every plain batch norm inside `module` into its per-view form, in place; returns `module`.

    Parameters, buffers and their names stay, so a state dict fits both forms.
    """
    for layer in module.modules():
        if type(layer) in _PER_VIEW:
            layer.__class__ = _PER_VIEW[type(layer)]
            layer.num_views = num_views
    return module
