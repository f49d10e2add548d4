"""Methods of lightly, one module each from views [V*N, 3, S, S] to the loss, put together as its examples do.

Numbers, heads' widths and weights are the config's; where lightly's heads have other norms or biases, they are its own.
What its examples do around the loss (momentum encoders first in a step, prototypes made unit vectors) is done here.
"""

import copy

import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import heads
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    normalize_weight,
    update_momentum,
)
from torch import nn

from benchmarks.peers import AbsentError, copy_linear_layers, part


def build_module(method, encoder: nn.Module, weights: dict, num_views: int) -> nn.Module:
    """Returns the module of a config's `method` on an encoder, with our initial weights.

    Raises `AbsentError` for a method, or a number of views, that lightly's examples do not have.
    """
    kinds = {"simsiam": SimSiam, "byol": BYOL, "simclr": SimCLR, "moco": MoCo, "swav": SwAV}
    if method.name not in kinds or (num_views != 2 and method.name != "simsiam"):
        raise AbsentError(f"lightly's examples have no {method.name} with {num_views} views")
    module = kinds[method.name](method, encoder)
    module.num_views = num_views
    for name in ("projector", "predictor", "prototypes"):
        if hasattr(module, name):
            copy_linear_layers(getattr(module, name), part(weights, name))
    if hasattr(module, "follower"):
        module.follower.load_state_dict(nn.ModuleList((module.encoder, module.projector)).state_dict())
    return module


class _Module(nn.Module):
    def __init__(self, encoder, projector):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def z(self, x):
        return self.projector(self.encoder(x).flatten(start_dim=1))


class SimSiam(_Module):
    """SimSiam, and FastSiam with more than two views: each predicts the mean projection of the others."""

    def __init__(self, method, encoder):
        sizes = encoder.num_features, method.projector.hidden, method.projector.out
        if method.projector.layers == 3:
            projector = heads.SimSiamProjectionHead(*sizes)
        else:
            # As their CIFAR-10 benchmark builds its two layers.
            features, hidden, out = sizes
            projector = heads.ProjectionHead(
                [
                    (features, hidden, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)),
                    (hidden, out, nn.BatchNorm1d(out, affine=False), None),
                ]
            )
        super().__init__(encoder, projector)
        out = method.projector.out
        self.predictor = heads.SimSiamPredictionHead(out, method.predictor.hidden, out)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views):
        zs = [self.z(x) for x in views.chunk(self.num_views)]
        ps = [self.predictor(z) for z in zs]
        zs = torch.stack([z.detach() for z in zs])
        others = [zs[torch.arange(len(zs), device=zs.device) != view].mean(0) for view in range(len(zs))]
        return sum(self.criterion(p, z) for p, z in zip(ps, others, strict=True)) / len(ps)


class _WithFollower(_Module):
    """The momentum encoder moves first in a step, by a constant share, as in their CIFAR-10 benchmark."""

    def __init__(self, method, encoder, projector):
        super().__init__(encoder, projector)
        self.momentum = method.momentum
        self.follower = copy.deepcopy(nn.ModuleList((encoder, projector)))
        deactivate_requires_grad(self.follower)

    def follow(self):
        for leader, follower in zip((self.encoder, self.projector), self.follower, strict=True):
            update_momentum(leader, follower, m=self.momentum)

    @torch.no_grad()
    def key(self, x):
        encoder, projector = self.follower
        return projector(encoder(x).flatten(start_dim=1))


class BYOL(_WithFollower):
    def __init__(self, method, encoder):
        hidden, out = method.projector.hidden, method.projector.out
        super().__init__(method, encoder, heads.BYOLProjectionHead(encoder.num_features, hidden, out))
        self.predictor = heads.BYOLPredictionHead(out, method.predictor.hidden, out)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views):
        self.follow()
        x0, x1 = views.chunk(2)
        p0, z0 = self.predictor(self.z(x0)), self.key(x0)
        p1, z1 = self.predictor(self.z(x1)), self.key(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class SimCLR(_Module):
    def __init__(self, method, encoder):
        sizes = encoder.num_features, method.projector.hidden, method.projector.out
        super().__init__(encoder, heads.SimCLRProjectionHead(*sizes))
        self.criterion = NTXentLoss(method.temperature)

    def forward(self, views):
        return self.criterion(*(self.z(x) for x in views.chunk(2)))


class MoCo(_WithFollower):
    """The symmetric loss of their CIFAR-10 benchmark, whose keys are shuffled; batch norm is not split."""

    def __init__(self, method, encoder):
        sizes = encoder.num_features, method.projector.hidden, method.projector.out
        super().__init__(method, encoder, heads.MoCoProjectionHead(*sizes))
        self.criterion = NTXentLoss(method.temperature, memory_bank_size=(method.queue, method.projector.out))

    def forward(self, views):
        self.follow()
        x0, x1 = views.chunk(2)
        return 0.5 * (self._one_way(x0, x1) + self._one_way(x1, x0))

    def _one_way(self, x_query, x_key):
        x_key, shuffle = batch_shuffle(x_key)
        return self.criterion(self.z(x_query), batch_unshuffle(self.key(x_key), shuffle))


class SwAV(_Module):
    def __init__(self, method, encoder):
        sizes = encoder.num_features, method.projector.hidden, method.projector.out
        super().__init__(encoder, heads.SwaVProjectionHead(*sizes))
        self.prototypes = heads.SwaVPrototypes(method.projector.out, method.prototypes)
        self.criterion = SwaVLoss(method.temperature, method.sinkhorn_iterations, method.epsilon)

    def forward(self, views):
        with torch.no_grad():
            normalize_weight(self.prototypes.heads[0].weight)
        scores = [self.prototypes(F.normalize(self.z(x), dim=1, p=2)) for x in views.chunk(2)]
        return self.criterion(scores, []).squeeze()
