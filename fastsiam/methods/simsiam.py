"""SimSiam (Chen and He, Exploring Simple Siamese Representation Learning, arXiv 2011.10566), Algorithm 1."""

import torch
from torch import nn

from fastsiam.kernels import negative_cosine, negative_cosine_all_pairs
from fastsiam.models.batch_norm import gains_by_view, view_by_view


class SimSiam(nn.Module):
    """f = projector(encoder(x)), h = predictor; loss D(p1, z2) / 2 + D(p2, z1) / 2 with z held constant.

    Of V > 2 views the loss is the mean of D(p_i, z_j) over all ordered pairs i != j, which for two is the same.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        *,
        stop_gradient: bool = True,
        num_views: int = 2,
    ):
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor
        self.stop_gradient, self.num_views = stop_gradient, num_views
        self.register_buffer("_loss_counter", torch.zeros(1, dtype=torch.int32), persistent=False)

    def forward(self, views):
        """`views`: [V*N, 3, S, S], the first views of N images, then the second ones, and so on.

        Returns `loss`, a scalar in [-1, 1], and `z` [V*N, d], detached.
        """
        z = self.projector(self._encode(views))
        p = self.predictor(z)
        if self.num_views == 2:
            z1, z2 = z.chunk(2)
            p1, p2 = p.chunk(2)
            counter = self._loss_counter
            loss = negative_cosine(p1, p2, z1, z2, stop_gradient=self.stop_gradient, counter=counter)
        else:
            p_of_views, z_of_views = (x.unflatten(0, (self.num_views, -1)) for x in (p, z))
            loss = negative_cosine_all_pairs(p_of_views, z_of_views, stop_gradient=self.stop_gradient)
        return {"loss": loss, "z": z.detach()}

    def _encode(self, views):
        if gains_by_view(self.encoder, views.device.type):
            return view_by_view(self.encoder, views, self.num_views)
        return self.encoder(views)

    def embed(self, images):
        """z [B, d] of images [B, 3, S, S]; what the collapse guard looks at, in evaluation mode."""
        return self.projector(self.encoder(images))

    def after_step(self, progress: float) -> None:
        """Nothing changes outside the gradient."""

    def constant_lr_parameters(self):
        """What keeps its initial learning rate where the config says so: the predictor (paper, Table 1)."""
        return self.predictor.parameters()


def loss_is_fused(num_views: int, device: torch.device) -> bool:
    """Whether the loss of so many views is the fused kernel on `device`; otherwise it is plain torch."""
    return num_views == 2 and device.type == "cuda"
