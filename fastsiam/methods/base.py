"""Contract between a method of self-supervised learning and the rest: training step, optimizer, evaluation, checkpoint.

A method is one file with one class, named in `METHODS`, and one section of the config, named in `MethodConfig`.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn


class Method(Protocol):
    """nn.Module that turns views into a loss, and images into embeddings.

    What a checkpoint must hold are parameters and persistent buffers: momentum encoders, queues and prototypes are
    buffers or modules without gradients. `encoder` is what a run exports; other ranks are reached through the `world`
    that `build_method` is given.
    """

    encoder: nn.Module
    """Images [B, 3, S, S] to pooled features [B, D]; its `num_features` is D."""

    def forward(self, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `loss`, a scalar of this rank whose gradients the ranks average, and detached diagnostics, among them
        `features` [V*N, D] of the encoder, view by view.

        `views`: [V_g*N, 3, S_g, S_g] a group, view by view, N images of this rank in every group. Diagnostics are
        scalars, or have one row for each view of each image, view by view. Runs under autocast and torch.compile as
        one graph: no value is read back to the host, nothing outside of buffers is changed. With train.micro_batch it
        is called for each micro batch of a step, and the step takes the mean of the losses.
        """

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Returns z [B, d] of images [B, 3, S, S] in evaluation mode; collapse is measured on it."""

    def after_step(self, progress: float, out: dict[str, torch.Tensor]) -> None:
        """Changes what the gradient does not, such as a momentum encoder; called once after each optimizer step.

        `progress`: share of the run's budget used so far, in [0, 1]. `out`: what `forward` returned in that step; with
        micro batches the means of their scalars, and the rows of all images in the order of the batch.
        """

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        """Returns the parameters that keep the initial learning rate under optimizer.predictor_lr=fixed."""
