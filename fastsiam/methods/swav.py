"""SwAV (Caron et al., NeurIPS 2020, arXiv 2006.09882): SimSiam with online clustering."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.config.method_sections import SwAVConfig
from fastsiam.kernels import sinkhorn
from fastsiam.methods.base import Layout, Method, at_least_fp32
from fastsiam.runtime.gather import gathered, of_all_ranks


class SwAV(Method):
    """Loss: each view predicts the codes of the first group's views, which Sinkhorn-Knopp makes of their scores.

    Scores are the cosines of projections with K prototypes; codes use every prototype equally often over the batch of
    all ranks and the queue. The mean over views i with codes and other views v of -q_i.log softmax(s_v / T).
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, config: SwAVConfig, dim: int,
        layout: Layout,
    ):  # fmt: skip
        """`dim`: of the projection."""
        super().__init__(encoder, projector, layout)
        self.predictor, self.config = predictor, config
        self.prototypes = nn.Linear(dim, config.prototypes, bias=False)
        self._scale_prototypes()
        for name, value in (("temperature", config.temperature), ("epsilon", config.epsilon)):
            self.register_buffer(name, torch.tensor(value), persistent=False)
        # Newest first; the same on all ranks, so that a run may go on with another number of them.
        self.register_buffer("queue", torch.zeros(layout.counts[0], config.queue, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue_weight", torch.zeros(()), persistent=False)

    def forward(self, views):
        """Returns `loss`, and, detached, `features` [V*N, D], `z` [V*N, d] of unit norm and `used_prototypes`.

        `used_prototypes`: share of the prototypes that is the first choice of some image of this rank. `views` as in
        `Method.forward`.
        """
        features = self.encoded(views)
        z = F.normalize(at_least_fp32(self.projector(features)), dim=1)
        scores = self._scores(z)
        predicted = scores
        if self.config.predictor is not None:
            predicted = self._scores(F.normalize(at_least_fp32(self.predictor(z)), dim=1))
        logs = F.log_softmax(predicted / self.temperature, dim=1).unflatten(0, (self.layout.num_views, -1))
        with_codes = range(self.layout.counts[0])
        codes = [self._codes(scores.unflatten(0, logs.shape[:2])[view], view) for view in with_codes]
        losses = [
            -(codes[i] * logs[v]).sum(1).mean() for i in with_codes for v in range(self.layout.num_views) if v != i
        ]
        return {
            "loss": torch.stack(losses).mean(),
            "features": features.detach(),
            "z": z.detach(),
            "used_prototypes": _share_used(codes[0].detach()),
        }

    def _scores(self, z):
        # fp32: in bf16 2 % of the codes have another first choice.
        with torch.autocast(z.device.type, enabled=False):
            return z @ at_least_fp32(self.prototypes.weight).t()

    def _codes(self, scores, view):
        """[N, K] of one view's scores [N, K]."""
        config, layout = self.config, self.layout
        if config.stop_gradient:
            scores = scores.detach()
        if not config.sinkhorn_iterations:
            return F.softmax(scores / self.epsilon, dim=1)
        weights, count = None, len(scores)
        if config.queue:
            # Each rank has a share of the queue, which all have whole.
            rows = self.queue[view][layout.rank :: layout.world_size]
            weights = torch.cat([scores.new_ones(count), self.queue_weight.to(scores.dtype).expand(len(rows))])
            scores = torch.cat([scores, self._scores(rows.to(scores.dtype)).detach()])
        everywhere = functools.partial(of_all_ranks, world_size=layout.world_size)
        if not config.stop_gradient:
            everywhere = functools.partial(gathered, world_size=layout.world_size, rank=layout.rank)
        codes = sinkhorn(
            scores, self.epsilon, iterations=config.sinkhorn_iterations, of_all_ranks=everywhere, weights=weights
        )
        return codes[:count]

    def before_step(self, progress, indices=None):
        super().before_step(progress, indices)
        if self.config.queue:
            is_used = (self.filled >= self.config.queue) & (progress >= self.config.queue_from)
            self.queue_weight.copy_(is_used)

    def after_backward(self):
        """Takes the gradient from prototypes that are frozen: momentum and decay must not move them either."""
        if self.progress < self.config.freeze_prototypes:
            self.prototypes.weight.grad = None

    def after_step(self, out):
        # Scaled again a unit row may change in its last bit.
        if self.progress >= self.config.freeze_prototypes:
            self._scale_prototypes()
        if self.config.queue:
            num_views = self.layout.counts[0]
            z = self.of_all_ranks(out["z"], self.layout.num_views).unflatten(0, (self.layout.num_views, -1))[:num_views]
            self.queue.copy_(torch.cat([z, self.queue], 1)[:, : self.config.queue])
            self.filled.add_(z.shape[1])

    @torch.no_grad()
    def _scale_prototypes(self):
        """Unit prototypes, outside of the gradient."""
        F.normalize(self.prototypes.weight, dim=1, out=self.prototypes.weight)


def _share_used(codes):
    used = codes.new_zeros(codes.shape[1]).scatter_(0, codes.argmax(1), 1.0)
    return used.mean()
