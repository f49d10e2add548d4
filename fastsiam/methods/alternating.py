"""SimSiam as what the paper takes it for: alternating optimisation of weights and targets (section 5)."""

import torch
from torch import nn

from fastsiam.config.method_sections import SimSiamAlternatingConfig, SimSiamAverageConfig
from fastsiam.kernels import negative_cosine
from fastsiam.methods.base import Layout, Method, at_least_fp32
from fastsiam.methods.momentum import Follower
from fastsiam.methods.simsiam import SimSiam
from fastsiam.runtime.gather import of_all_ranks


class Alternating(SimSiam):
    """k steps of SGD on the weights, while the targets eta are those of the weights before these steps.

    The paper computes the k steps' targets beforehand and caches them. Here the weights are copied, and the targets
    computed on the way from the same views: the same numbers without the cache. With k = 1 this is SimSiam.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        config: SimSiamAlternatingConfig,
        layout: Layout,
    ):
        super().__init__(encoder, projector, predictor, layout=layout)
        self.held, self.steps = Follower(encoder, projector), config.steps
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._step = None
        self.register_load_state_dict_post_hook(_read_step_again)

    def targets(self, views, z):
        with torch.no_grad():
            return self.held.projector(self.encoded(views, encoder=self.held.encoder))

    def after_loading(self):
        self.held.restart(self.encoder, self.projector)

    def after_step(self, out):
        # Read back once, and after a checkpoint was loaded.
        self._step = (self.step.item() if self._step is None else self._step) + 1
        self.step.fill_(self._step)
        if self._step % self.steps == 0:
            self.held.follow(self.encoder, self.projector, momentum=0.0)


def _read_step_again(method, _):
    method._step = None


class Average(Method):
    """Loss D(z1, eta) without a predictor, where eta of an image is a moving average over its augmentations.

    eta <- m eta + (1 - m) z2, section 5.2, "Predictor": the average takes over what the predictor is taken to do, the
    expectation over augmentations. Both views take turns; the average keeps the mean of both.
    """

    needs_whole_batch = True

    def __init__(self, encoder: nn.Module, projector: nn.Module, config: SimSiamAverageConfig, layout: Layout):
        super().__init__(encoder, projector, layout)
        self.momentum = config.momentum
        dim = next(module.out_features for module in reversed(projector) if isinstance(module, nn.Linear))
        self.register_buffer("eta", torch.zeros(config.images, dim))
        self._indices, self._before = None, None

    def before_step(self, progress, indices=None):
        """Reads the averages of the step's images, which the graph finds under one name and of one shape."""
        super().before_step(progress, indices)
        self._indices = torch.from_numpy(indices).to(self.eta.device)
        self._before = self.eta[self._indices]

    def forward(self, views):
        features = self.encoded(views)
        z = self.projector(features)
        z1, z2 = at_least_fp32(z).chunk(2)
        eta1, eta2 = (torch.lerp(other.detach(), self._before, self.momentum) for other in (z2, z1))
        loss = negative_cosine(z1, z2, eta2, eta1, stop_gradient=False)
        return {"loss": loss, "features": features.detach(), "z": z.detach()}

    def after_step(self, out):
        eta = torch.lerp(at_least_fp32(out["z"]).unflatten(0, (2, -1)).mean(0), self._before, self.momentum)
        world = self.layout.world_size
        self.eta[of_all_ranks(self._indices, world).flatten()] = of_all_ranks(eta, world).flatten(0, 1)
