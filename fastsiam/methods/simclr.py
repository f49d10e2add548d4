"""SimCLR (Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709): SimSiam with negatives."""

import torch
from torch import nn

from fastsiam.config.method_sections import SimCLRConfig
from fastsiam.kernels import info_nce, nt_xent
from fastsiam.methods.base import Layout, Method
from fastsiam.runtime.gather import gathered


class SimCLR(Method):
    """Loss -log exp(z_i.z_j / T) / sum_{k != i} exp(z_i.z_k / T), the mean over the V*N anchors of all ranks (Eq. 1).

    Keys are the other rows of the batch on all ranks, gathered with their gradients. With a predictor the anchors are
    its outputs, and `stop_gradient` holds the keys: SimSiam's variants (appendix C).
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, config: SimCLRConfig, layout: Layout
    ):
        super().__init__(encoder, projector, layout)
        self.predictor, self.stop_gradient = predictor, config.stop_gradient
        self._is_plain = config.predictor is None and not config.stop_gradient
        # A tensor: a number would be one graph of the compiler for each value.
        self.register_buffer("temperature", torch.tensor(config.temperature), persistent=False)

    def forward(self, views):
        """Returns `loss`, and, detached, `features` [V*N, D] and `z` [V*N, d]; `views` as in `Method.forward`."""
        features = self.encoded(views)
        z = self.projector(features)
        loss = self.loss(self.predictor(z), z)
        return {"loss": loss, "features": features.detach(), "z": z.detach()}

    def loss(self, queries, keys):
        """Returns InfoNCE of this rank's queries [V*N, d] among the keys of all ranks, whose own are [V*N, d]."""
        layout = self.layout
        if self._is_plain and layout.world_size == 1:
            return nt_xent(keys, self.temperature, num_views=layout.num_views)
        keys = keys.detach() if self.stop_gradient else keys
        if layout.world_size > 1 and self.stop_gradient:
            everyone = self.of_all_ranks(keys, 1)
        else:
            everyone = gathered(keys, layout.world_size, layout.rank).flatten(0, 1)
        selves = torch.arange(len(queries), device=queries.device) + layout.rank * len(queries)
        return info_nce(queries, everyone, _other_views(selves, layout), self.temperature, selves=selves)


def _other_views(selves, layout):
    """[V*N, V - 1]: where in the keys of all ranks the other views of each row are."""
    own = selves.view(layout.num_views, -1)
    return torch.stack([own.roll(-step, 0).flatten() for step in range(1, layout.num_views)], 1)
