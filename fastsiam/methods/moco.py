"""MoCo v2 (Chen, Fan, Girshick, He, arXiv 2003.04297): keys of a momentum encoder, negatives in a queue."""

import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.config.method_sections import MoCoConfig
from fastsiam.kernels import info_nce_queue
from fastsiam.methods.base import Layout, Method, at_least_fp32
from fastsiam.methods.momentum import Follower


class MoCo(Method):
    """Loss of a query q (view 1) and its key k (view 2): -log exp(q.k / T) / (exp(q.k / T) + sum_queue exp(q.k' / T)).

    The queue holds the keys of earlier steps of all ranks. Batch norm averages over each view apart: the query's
    statistics are other images' than the key's, which is what the authors shuffle images over GPUs for. Their groups of
    32 images are another model; numbers of both are not to be compared.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, config: MoCoConfig, dim: int, layout: Layout):
        """`dim`: of the projection."""
        super().__init__(encoder, projector, layout)
        self.key = Follower(encoder, projector)
        self.momentum, self.symmetric = config.momentum, config.symmetric
        self.register_buffer("temperature", torch.tensor(config.temperature), persistent=False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, dim), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def forward(self, views):
        """Returns `loss`, and, detached, `features` [N, D] and `z` [N, d] of the queries, and `keys` [N, d].

        Of the symmetric loss they have 2N rows, view by view. `views` as in `Method.forward`, two of each image.
        """
        views = views if len(views) == 2 else list(views[0].chunk(2))
        asked, answered = (views, views[::-1]) if self.symmetric else (views[:1], views[1:])
        counts = (1,) * len(asked)
        features = self.encoded(asked, counts)
        queries = self.at(self.projector, features, len(asked))
        with torch.no_grad():
            keys = self.encoded(answered, counts, self.key.encoder)
            keys = self.at(self.key.projector, keys, len(asked))
        pairs = zip(queries.chunk(len(asked)), keys.chunk(len(asked)), strict=True)
        loss = torch.stack([info_nce_queue(q, k, self.queue, self.temperature) for q, k in pairs]).sum()
        return {"loss": loss, "features": features.detach(), "z": queries.detach(), "keys": keys.detach()}

    def after_loading(self):
        self.key.restart(self.encoder, self.projector)

    def after_step(self, out):
        """Takes in the keys, and moves their encoder: the authors move it at the start of the next step."""
        keys = F.normalize(self.of_all_ranks(at_least_fp32(out["keys"]), 2 if self.symmetric else 1), dim=1)
        place = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, place, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))
        self.key.follow(self.encoder, self.projector, self.momentum)
