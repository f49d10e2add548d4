"""BYOL (Grill et al., Bootstrap your own latent, NeurIPS 2020, arXiv 2006.07733): SimSiam with a momentum target."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.config.method_sections import BYOLConfig
from fastsiam.methods.base import Layout
from fastsiam.methods.momentum import Follower
from fastsiam.methods.simsiam import SimSiam


class BYOL(SimSiam):
    """Loss (2 - 2 cos(p1, z2')) + (2 - 2 cos(p2, z1')), where z' is the projection of the target network.

    The sum over both directions, Eq. 2 and the text below: four times the gradient of SimSiam's convention. Of V > 2
    views it is the mean over all ordered pairs, times two.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, config: BYOLConfig, layout: Layout
    ):
        super().__init__(encoder, projector, predictor, layout=layout)
        self.target, self.momentum = Follower(encoder, projector), config.momentum

    def targets(self, views, z):
        with torch.no_grad():
            return self.target.projector(self.encoded(views, encoder=self.target.encoder))

    def diagnostics(self, targets):
        """Returns the spread of the targets of view 1: 1 for isotropic ones, 0 for a constant."""
        unit = F.normalize(targets.unflatten(0, (self.layout.num_views, -1))[0].float(), dim=1)
        return {"target_std_ratio": unit.std(0).mean() * unit.shape[1] ** 0.5}

    def loss(self, p, targets):
        return 4 + 4 * super().loss(p, targets)

    def after_loading(self):
        self.target.restart(self.encoder, self.projector)

    def after_step(self, out):
        """Moves the target, with the online weights after the step (authors' code)."""
        self.target.follow(self.encoder, self.projector, momentum_at(self.progress, self.momentum))

    def constant_lr_parameters(self):
        """Returns nothing: the predictor's rate decays with the others."""
        return ()


def momentum_at(progress: float, start: float) -> float:
    """Returns 1 - (1 - start) (cos(pi progress) + 1) / 2: `start` in the first step, below 1 in the last."""
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
