"""SimSiam as others run it: one file each, with `build_step` and `build_loader`.

`build_step(config, weights, device, ...)` gives a function from views [2N, 3, S, S] to the loss of one training step,
on the model of `config` with the weights of `fastsiam.build_method`'s state dict; its attributes `model`, `encoder` and
`optimizer` are what it trains, groups of the optimizer with `scheduled` as `fastsiam.optim` has them.
`build_loader(paths, spec=...)` gives an iterable over batches that begin with two views [N, 3, S, S] of N images, with
the numbers of a `ViewSpec`. Both raise `AbsentError` where the peer cannot run here.
"""

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader

from fastsiam.models.encoder import build_encoder


class AbsentError(Exception):
    """A peer that cannot run here; the text is the sentence that stands for it in the results."""


class Photographs(Dataset):
    """Files opened as torchvision's ImageFolder opens them; `transform` makes the views of one PIL image."""

    def __init__(self, paths: list[str], transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(default_loader(self.paths[index]))


def data_loader(paths: list[str], transform, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Batches `[x1, x2]` in random order, the last incomplete one dropped; the workers live through all epochs."""
    return DataLoader(
        Photographs(paths, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # A fork would copy the locks of DALI's threads in this process.
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=device.type == "cuda",
    )


def plain_encoder(model) -> nn.Module:
    """Builds the encoder of a config's `model` section with plain batch norm; `num_features` is its width.

    torchvision's ResNet without classifier; a CIFAR ResNet, which torchvision lacks, is ours.
    """
    if model.width is not None:
        return build_encoder(model.encoder, model.stem, model.width, model.zero_init_residual)
    encoder = getattr(torchvision.models, model.encoder)(zero_init_residual=model.zero_init_residual)
    encoder.num_features, encoder.fc = encoder.fc.in_features, nn.Identity()
    if model.stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the entries of a state dict below `prefix`, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in weights.items() if name.startswith(f"{prefix}.")}
