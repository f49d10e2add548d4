"""Layer-wise rates against tables written by hand: tensors and power of the decay for each group."""

import pytest
import torch
from torch import nn

from fastsiam.models.encoder import build_encoder
from fastsiam.optim.layerwise import blocks_of, layerwise_groups

# Tensors in the stem and in each block: a convolution has 1, a batch norm 2.
BASIC, BASIC_SHORTCUT, BOTTLENECK, BOTTLENECK_SHORTCUT = 6, 9, 9, 12
TABLES = {
    ("resnet18", "imagenet", None): [3, *[BASIC] * 2, *[BASIC_SHORTCUT, BASIC] * 3],
    ("resnet50", "imagenet", None): [
        3,
        *[BOTTLENECK_SHORTCUT, *[BOTTLENECK] * 2],
        *[BOTTLENECK_SHORTCUT, *[BOTTLENECK] * 3],
        *[BOTTLENECK_SHORTCUT, *[BOTTLENECK] * 5],
        *[BOTTLENECK_SHORTCUT, *[BOTTLENECK] * 2],
    ],
    ("cifar_resnet20", "cifar", 8): [3, *[BASIC] * 3, BASIC_SHORTCUT, *[BASIC] * 2, BASIC_SHORTCUT, *[BASIC] * 2],
}


@pytest.mark.parametrize(("built", "tensors"), TABLES.items(), ids=lambda value: str(value[0]))
def test_rates_fall_from_block_to_block(built, tensors):
    with torch.device("meta"):
        encoder = build_encoder(*built, zero_init_residual=False)
        head = nn.Linear(4, 3)
    groups = layerwise_groups(encoder, head, rate=0.8, head_rate=5.0, decay=0.5)
    assert [len(group["params"]) for group in groups] == [*tensors, 2]
    depth = len(tensors) - 1
    expected = [0.8 / 2 ** (depth - number) for number in range(depth + 1)] + [5.0]
    assert [group["lr"] for group in groups] == pytest.approx(expected, rel=1e-12)
    assert groups[0]["params"][0] is encoder.conv1.weight
    assert groups[-1]["params"] == [head.weight, head.bias]


def test_without_decay_the_encoder_is_one_group():
    encoder = build_encoder("cifar_resnet8", "cifar", 4, zero_init_residual=False)
    groups = layerwise_groups(encoder, nn.Linear(16, 2), rate=0.1, head_rate=0.2)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(27, 0.1), (2, 0.2)]


def test_blocks_are_numbered_modules_with_layers():
    """A deep stem's layers are numbered too; what follows the blocks has the last one's rate."""
    encoder = nn.Module()
    encoder.stem = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    encoder.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))) for _ in range(2))
    encoder.norm = nn.LayerNorm(2)
    encoder.token = nn.Parameter(torch.zeros(2))
    assert blocks_of(encoder) == ["blocks.0", "blocks.1"]
    groups = layerwise_groups(encoder, nn.Linear(2, 2), rate=1.0, head_rate=1.0, decay=0.1)
    assert [len(group["params"]) for group in groups] == [5, 4, 6, 2]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.1, 1.0, 1.0])
