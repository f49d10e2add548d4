"""SimSiam (Chen and He, Exploring Simple Siamese Representation Learning, arXiv 2011.10566), Algorithm 1."""

import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.config.method_sections import SimSiamConfig
from fastsiam.kernels import (
    negative_cosine,
    negative_cosine_all_pairs,
    negative_cosine_asymmetric,
    negative_cosine_mean_target,
)
from fastsiam.methods.base import TWO_VIEWS, Layout, Method, at_least_fp32

_PLAIN = SimSiamConfig(name="simsiam")


class SimSiam(Method):
    """Loss D(p1, z2) / 2 + D(p2, z1) / 2 of z = projector(encoder(x)), held constant there, and p = predictor(z).

    Of V > 2 views the loss is the mean of D(p_i, z_j) over all ordered pairs i != j, which for two is the same, or with
    `target_views` K FastSiam's (Pototzky, Sultan, Schmidt-Thieme, GCPR 2022): the mean of D(p_i, mean of K z_j).
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, config: SimSiamConfig = _PLAIN,
        layout: Layout = TWO_VIEWS,
    ):  # fmt: skip
        super().__init__(encoder, projector, layout)
        self.predictor = predictor
        self.stop_gradient, self.symmetric = config.stop_gradient, config.symmetric
        self.similarity, self.target_views = config.similarity, config.target_views
        self.register_buffer("_loss_counter", torch.zeros(1, dtype=torch.int32), persistent=False)

    def forward(self, views):
        """Returns `loss`, a scalar, in [-1, 1] for the cosine, and, detached, `features` [V*N, D] and `z` [V*N, d].

        `views`: [V_g*N, 3, S_g, S_g] a group, the first views of N images, then the second ones, and so on.
        """
        features = self.encoded(views)
        z = self.projector(features)
        p = self.predictor(z)
        targets = self.targets(views, z)
        loss = self.loss(p, targets)
        return {"loss": loss, "features": features.detach(), "z": z.detach(), **self.diagnostics(targets)}

    @property
    def is_mean_over_pairs(self):
        is_variant = self.similarity != "cosine" or not self.symmetric or self.target_views is not None
        return type(self) is SimSiam and not is_variant

    def targets(self, views, z):
        """Returns [V*N, d], what the predictions of the other views are compared with."""
        return z.detach() if self.stop_gradient else z

    def diagnostics(self, targets):
        """Returns scalars for the log."""
        return {}

    def loss(self, p, targets):
        """Returns the mean negative similarity of predictions [V*N, d] and the targets [V*N, d] of other views."""
        p, z = (x.unflatten(0, (self.layout.num_views, -1)) for x in (p, targets))
        if self.similarity == "cross_entropy":
            return torch.stack([_cross_entropy(p[i], z[j]) for i, j in self._pairs()]).mean()
        if not self.symmetric:
            return negative_cosine_asymmetric(p[0::2].flatten(0, 1), z[1::2].flatten(0, 1), stop_gradient=False)
        if self.layout.num_views == 2:
            return negative_cosine(*p, *z, stop_gradient=False, counter=self._loss_counter)
        if self.target_views is None:
            return negative_cosine_all_pairs(p, z, stop_gradient=False)
        means = [negative_cosine_mean_target(p[i], z[self._next(i)], stop_gradient=False) for i in range(len(p))]
        return torch.stack(means).mean()

    def _next(self, view):
        """The numbers of the views that are the targets of one, in a circle."""
        return [(view + step) % self.layout.num_views for step in range(1, self.target_views + 1)]

    def _pairs(self):
        num_views = self.layout.num_views
        if not self.symmetric:
            return [(view, view + 1) for view in range(0, num_views, 2)]
        return [(i, j) for i in range(num_views) for j in range(num_views) if i != j]

    def constant_lr_parameters(self):
        """Returns the predictor's parameters, which keep their learning rate in the paper's Table 1."""
        return self.predictor.parameters()


def _cross_entropy(p, z):
    """The mean of -softmax(z).log softmax(p), section 4.5."""
    return -(F.softmax(at_least_fp32(z), dim=1) * F.log_softmax(at_least_fp32(p), dim=1)).sum(1).mean()
