"""Projector and predictor (SimSiam, section 4 "Baseline settings")."""

from itertools import pairwise

from torch import nn


def build_projector(num_features: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    """f's MLP from [B, num_features] to z [B, out]: BN after each layer, ReLU after all but the last.

    No linear layer has a bias, for the batch norm behind it removes it; the last batch norm has no affine part
    (68.2 against 68.1, section 4.4).
    """
    widths = [num_features, *[hidden] * (layers - 1)]
    modules = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(widths[-1], out, bias=False), nn.BatchNorm1d(out, affine=False))


def build_predictor(dim: int, hidden: int) -> nn.Sequential:
    """h from z [B, dim] to p [B, dim]: a bottleneck with BN and ReLU inside, neither at its output (Table 3)."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )
