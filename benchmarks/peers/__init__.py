"""SimSiam and its relatives as others run them: one file each, with `build_step` and `build_loader`.

`build_step(config, weights, device, ...)` gives a function from views [V*N, 3, S, S] to the loss of one training step,
on the model of `config` with the weights of `fastsiam.build_method`'s state dict; its attributes `model`, `encoder` and
`optimizer` are what it trains, groups of the optimizer with `scheduled` as `fastsiam.optim` has them.
Where something else than the rate follows a schedule, the step's `before(progress)` is called with the share of the
run that is over. `build_loader(paths, groups=...)` gives an iterable over batches that begin with the views
[N, 3, S, S] of N images, counts and numbers as in a config's `view_groups`. Both raise `AbsentError` where the peer
cannot run here, or has no such method.
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


def copy_linear_layers(head: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Gives the linear layers of a peer's head the weights of ours, in their order.

    A bias, or a batch norm, that ours lacks keeps its own start. Raises `ValueError` where they are not equally many.
    """
    ours = [name.removesuffix("weight") for name, value in weights.items() if value.ndim == 2]
    theirs = [module for module in head.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for name, layer in zip(ours, theirs, strict=True):
            layer.weight.copy_(weights[f"{name}weight"])
            if layer.bias is not None and f"{name}bias" in weights:
                layer.bias.copy_(weights[f"{name}bias"])


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the entries of a state dict below `prefix`, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in weights.items() if name.startswith(f"{prefix}.")}
