"""Backbones: torchvision's ResNets and the CIFAR ResNets of He et al.."""

import torch
import torchvision
from torch import nn


def build_encoder(name: str, stem: str, width: int | None, zero_init_residual: bool) -> nn.Module:
    """An encoder from images [B, 3, S, S] to pooled features [B, D]; `num_features` is D.

    `name`: torchvision's (`resnet50`) or `cifar_resnetN` with N = 6n+2 and `width` channels in its first stage.
    `stem`: `imagenet`, or `cifar` for a 3x3 convolution of stride 1 and no pooling (paper, appendix D).
    `zero_init_residual`: the last batch norm of a block starts at zero (Goyal et al. 2017).
    """
    if name.startswith("cifar_resnet"):
        return CifarResNet(int(name.removeprefix("cifar_resnet")), width, zero_init_residual)
    encoder = getattr(torchvision.models, name)(weights=None, zero_init_residual=zero_init_residual)
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    encoder.num_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: a 3x3 stem, three stages of n basic blocks at 32, 16 and 8 px, mean pooling.

    Shortcuts that change the width are 1x1 convolutions (their option B; their CIFAR nets pad with zeros).
    """

    def __init__(self, depth: int, width: int, zero_init_residual: bool):
        super().__init__()
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                out = width << stage
                stride = 2 if stage and not block else 1
                shortcut = (
                    nn.Identity()
                    if channels == out
                    else torchvision.ops.misc.Conv2dNormActivation(channels, out, 1, stride, activation_layer=None)
                )
                blocks.append(torchvision.models.resnet.BasicBlock(channels, out, stride, shortcut))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for block in self.blocks:
                nn.init.zeros_(block.bn2.weight)

    def forward(self, x):
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        return x.mean((2, 3))
