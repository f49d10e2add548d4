"""Small networks with batch norm."""

import torch
from torch import nn

from fastsiam.methods.simsiam import SimSiam

IMAGES = 6


def mlp():
    return nn.Sequential(
        nn.Linear(5, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 4, bias=False),
        nn.BatchNorm1d(4, affine=False, momentum=0.3),
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4, eps=1e-3)),
    )


NETWORKS = {
    "1d": (mlp, (5,), torch.contiguous_format),
    "2d": (convolutions, (3, 6, 6), torch.contiguous_format),
    "2d_channels_last": (convolutions, (3, 6, 6), torch.channels_last),
}


def build(name, num_views, images=IMAGES):
    """The plain network in fp64 with random affine parts, and views whose means and scales differ a lot."""
    network, shape, memory_format = NETWORKS[name]
    torch.manual_seed(0)
    plain = network().double().to(memory_format=memory_format)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.uniform_(layer.bias, -1.0, 1.0)
    views = [(2.0**view) * torch.randn(images, *shape, dtype=torch.float64) + view for view in range(num_views)]
    return plain, torch.cat(views).contiguous(memory_format=memory_format)


def one_layer():
    """A method with one convolution instead of a ResNet: each kernel costs the C++ compiler seconds.

    It has no ReLU, at whose kink fp32's rounding changes gradients: after these 20 steps on one rank the ResNet-8 in
    fp32 is 4e-2 away from itself in float64, so that two ranks can be compared with one in float64 only.
    """
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    projector = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False))
    return SimSiam(encoder, projector, nn.Linear(8, 8))
