"""What a method of self-supervised learning is to the rest: training step, optimizer, evaluation, checkpoint.

A method is one file with one class here, one section in `config.method_sections`, and one line in `build_method`.
"""

import abc
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastsiam.models.batch_norm import gains_by_view, view_by_view, views_at_a_time
from fastsiam.runtime.gather import of_all_ranks


class Layout(NamedTuple):
    """How a step's images lie: `counts` of views in each group, and this rank among those that share a batch."""

    counts: tuple[int, ...]
    rank: int = 0
    world_size: int = 1

    @property
    def num_views(self) -> int:
        return sum(self.counts)


TWO_VIEWS = Layout((2,))


class Method(nn.Module, abc.ABC):
    """nn.Module that turns views into a loss, and images into embeddings.

    What a checkpoint must hold are parameters and persistent buffers: momentum encoders, queues and prototypes are
    buffers or modules without gradients. A run exports `encoder`: images [B, 3, S, S] to pooled features [B, D], with
    D in its `num_features`.
    """

    is_mean_over_pairs = False
    """Whether the loss is the mean of D(p_i, z_j) over ordered pairs of views, so that each image has its own."""

    needs_whole_batch = False
    """Whether a step's images must go through `forward` at once: not with train.micro_batch."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, layout: Layout):
        super().__init__()
        self.encoder, self.projector, self.layout = encoder, projector, layout
        self.progress = 0.0

    @abc.abstractmethod
    def forward(self, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `loss`, a scalar of this rank whose gradients the ranks average, and detached diagnostics, among them
        `features` [V*N, D] of the encoder and `z` [V*N, d] of the projector, view by view.

        `views`: [V_g*N, 3, S_g, S_g] a group, view by view, N images of this rank in every group. Diagnostics are
        scalars, or have one row for each view of each image, view by view. Runs under autocast and torch.compile as
        one graph: no value is read back to the host, nothing outside of buffers is changed. With train.micro_batch it
        is called for each micro batch of a step, and the step takes the mean of the losses.
        """

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Returns z [B, d] of images [B, 3, S, S] in evaluation mode; collapse is measured on it."""
        return self.projector(self.encoder(images))

    def after_loading(self) -> None:
        """Follows the encoder where it has got other weights than it was built with (model.weights)."""

    def before_step(self, progress: float, indices: np.ndarray | None = None) -> None:
        """Notes the share of the run's budget used before the step, in [0, 1].

        `indices`: [N] of this rank's images in the data.
        """
        self.progress = progress

    def after_backward(self) -> None:
        """Changes gradients before the optimizer sees them; called once a step."""

    def after_step(self, out: dict[str, torch.Tensor]) -> None:
        """Changes what the gradient does not, such as a momentum encoder; called once after each optimizer step.

        `out`: what `forward` returned in that step; with micro batches the means of their scalars, and the rows of all
        images in the order of the batch.
        """

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        """Returns the parameters that keep the initial learning rate under optimizer.predictor_lr=fixed."""
        return ()

    def encoded(self, views, counts: tuple[int, ...] | None = None, encoder: nn.Module | None = None):
        """Returns features [V*N, D] of groups of views, view by view; `counts` and `encoder`: those of the method.

        Groups of one size are one batch, so that joint statistics are of all their views.
        """
        encoder, counts = encoder or self.encoder, counts or self.layout.counts
        found = [None] * len(views)
        for places in _places_by_size(views):
            joined = views[places[0]] if len(places) == 1 else torch.cat([views[place] for place in places])
            features = self._encoded(encoder, joined, sum(counts[place] for place in places))
            if len(places) == len(views):
                return features
            parts = features.split([len(views[place]) for place in places])
            for place, part in zip(places, parts, strict=True):
                found[place] = part
        return torch.cat(found)

    def _encoded(self, encoder, views, count):
        if gains_by_view(encoder, views):
            return view_by_view(encoder, views, count)
        return self.at(encoder, views, count)

    def at(self, module: nn.Module, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Applies `module` to `rows` of so many views, whose batch statistics may be apart."""
        if count == self.layout.num_views:
            return module(rows)
        with views_at_a_time(module, count):
            return module(rows)

    def of_all_ranks(self, rows: torch.Tensor, num_views: int) -> torch.Tensor:
        """Returns [V*W*N, d], the rows of all ranks' images in the order of the batch; `rows`: [V*N, d] of this rank.

        No gradient.
        """
        apart = of_all_ranks(rows.contiguous(), self.layout.world_size).unflatten(1, (num_views, -1))
        return apart.transpose(0, 1).flatten(0, 2)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Returns `x`, half precision as fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _places_by_size(views):
    """Lists of the places of groups of one size, in the order in which the sizes come."""
    places = {}
    for place, group in enumerate(views):
        places.setdefault(tuple(group.shape[1:]), []).append(place)
    return list(places.values())
