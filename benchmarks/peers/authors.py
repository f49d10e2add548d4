"""The authors' SimSiam: two encoder calls, eager fp32 NCHW, PIL transforms in a DataLoader.

Written anew from the paper (arXiv 2011.10566, Algorithm 1 and section 4) and the settings that
facebookresearch/simsiam names in its README and options; none of its code is here.
"""

import contextlib
import random

import torch
from PIL import ImageFilter
from torch import nn
from torchvision import transforms as T

from benchmarks.peers import AbsentError, data_loader, plain_encoder
from fastsiam.config.views import ViewSpec


def check_is_theirs(method: str, num_views: int) -> None:
    """Raises `AbsentError` for another method than SimSiam with two views."""
    if (method, num_views) != ("simsiam", 2):
        raise AbsentError("SimSiam's authors publish SimSiam with two views alone")


class SimSiam(nn.Module):
    """Algorithm 1 on plain modules; the names of its weights are those of `fastsiam.build_method`."""

    def __init__(self, model, heads):
        super().__init__()
        self.encoder = plain_encoder(model)
        hidden, out = heads.projector.hidden, heads.projector.out
        width, layers = self.encoder.num_features, []
        for _ in range(heads.projector.layers - 1):
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.projector = nn.Sequential(*layers, nn.Linear(width, out, bias=False), nn.BatchNorm1d(out, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(out, heads.predictor.hidden, bias=False),
            nn.BatchNorm1d(heads.predictor.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(heads.predictor.hidden, out),
        )

    def forward(self, x1, x2):
        """Two views [N, 3, S, S] to p1, p2, and z1, z2 without their gradients, each [N, d]."""
        z1 = self.projector(self.encoder(x1))
        z2 = self.projector(self.encoder(x2))
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


def build_step(config, weights, device, *, precision=contextlib.nullcontext, memory_format=torch.contiguous_format):
    """Builds the step, in fp32 unless `precision` is an autocast; SGD as torch builds it by default, not fused.

    The predictor keeps its rate where the config says so, as their --fix-pred-lr does.
    """
    check_is_theirs(config.method.name, config.view_groups[0].count)
    model = SimSiam(config.model, config.method).to(device, memory_format=memory_format)
    model.load_state_dict(weights)
    criterion = nn.CosineSimilarity(dim=1)
    backbone = [*model.encoder.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.SGD(
        [
            {"params": backbone, "scheduled": True},
            {"params": model.predictor.parameters(), "scheduled": config.optimizer.predictor_lr == "scheduled"},
        ],
        lr=config.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )

    def step(views):
        x1, x2 = views.chunk(2)
        with precision():
            p1, p2, z1, z2 = model(x1, x2)
            loss = -(criterion(p1, z2).mean() + criterion(p2, z1).mean()) * 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.model, step.encoder, step.optimizer = model, model.encoder, optimizer
    return step


class TwoCrops:
    """Two draws of one transform on one image."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return [self.transform(image), self.transform(image)]


class GaussianBlur:
    """PIL's Gaussian blur, its standard deviation uniform in `sigma` pixels (SimCLR, appendix A)."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def build_transform(spec: ViewSpec) -> TwoCrops:
    """Builds the paper's augmentation (section 4 "Baseline settings") of a PIL image to two tensors [3, size, size].

    Without blur its transform is left out (appendix D).
    """
    jitter = T.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    blur = [T.RandomApply([GaussianBlur(spec.blur_sigma)], p=spec.blur)] if spec.blur else []
    return TwoCrops(
        T.Compose(
            [
                T.RandomResizedCrop(spec.size, scale=spec.crop_scale),
                T.RandomApply([jitter], p=spec.jitter),
                T.RandomGrayscale(p=spec.grayscale),
                *blur,
                T.RandomHorizontalFlip(p=spec.flip),
                T.ToTensor(),
                T.Normalize(spec.mean, spec.std),
            ]
        )
    )


def build_loader(paths, *, groups, batch_size, workers, device):
    """Their loader: each file decoded once by PIL in a worker process, two crops of it transformed there.

    `groups`: of the config; theirs is one of two views.
    """
    ((count, spec),) = groups
    check_is_theirs("simsiam", count)
    return data_loader(paths, build_transform(spec), batch_size, workers, device)
