"""SimSiam (Chen and He, Exploring Simple Siamese Representation Learning, arXiv 2011.10566), Algorithm 1."""

import torch
from torch import nn

from fastsiam.kernels import negative_cosine, negative_cosine_all_pairs
from fastsiam.models.batch_norm import gains_by_view, view_by_view, views_at_a_time


class SimSiam(nn.Module):
    """Loss D(p1, z2) / 2 + D(p2, z1) / 2 of z = projector(encoder(x)), held constant there, and p = predictor(z).

    Of V > 2 views the loss is the mean of D(p_i, z_j) over all ordered pairs i != j, which for two is the same.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        *,
        stop_gradient: bool = True,
        view_counts: tuple[int, ...] = (2,),
    ):
        """`view_counts`: number of views in each group."""
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor
        self.stop_gradient, self.view_counts = stop_gradient, view_counts
        self.register_buffer("_loss_counter", torch.zeros(1, dtype=torch.int32), persistent=False)

    def forward(self, views):
        """Returns `loss`, a scalar in [-1, 1], and, detached, `features` [V*N, D] and `z` [V*N, d].

        `views`: [V_g*N, 3, S_g, S_g] a group, the first views of N images, then the second ones, and so on.
        """
        features = [self._encode(*group) for group in zip(views, self.view_counts, strict=True)]
        features = features[0] if len(features) == 1 else torch.cat(features)
        z = self.projector(features)
        p = self.predictor(z)
        target = z.detach() if self.stop_gradient else z
        num_views = sum(self.view_counts)
        if num_views == 2:
            p1, p2 = p.chunk(2)
            z1, z2 = target.chunk(2)
            loss = negative_cosine(p1, p2, z1, z2, stop_gradient=False, counter=self._loss_counter)
        else:
            p_of_views, z_of_views = (x.unflatten(0, (num_views, -1)) for x in (p, target))
            loss = negative_cosine_all_pairs(p_of_views, z_of_views, stop_gradient=False)
        return {"loss": loss, "features": features.detach(), "z": z.detach()}

    def _encode(self, views, count):
        if gains_by_view(self.encoder, views.device.type):
            return view_by_view(self.encoder, views, count)
        if len(self.view_counts) == 1:
            return self.encoder(views)
        with views_at_a_time(self.encoder, count):
            return self.encoder(views)

    def embed(self, images):
        """Returns z [B, d] of images [B, 3, S, S]."""
        return self.projector(self.encoder(images))

    def after_step(self, progress: float, out: dict) -> None:
        """Does nothing: all of SimSiam is in the gradient."""

    def constant_lr_parameters(self):
        """Returns the predictor's parameters, which keep their learning rate in the paper's Table 1."""
        return self.predictor.parameters()


def loss_is_fused(num_views: int, device: torch.device) -> bool:
    """Returns True where the loss of so many views is the fused kernel on `device`; otherwise it is plain torch."""
    return num_views == 2 and device.type == "cuda"
