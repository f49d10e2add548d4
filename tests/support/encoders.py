"""Encoder files with random weights, as a run would leave them."""

import torch

from fastsiam.config import load_config
from fastsiam.models.encoder import build_encoder
from fastsiam.run.encoder_file import describe_encoder, save_encoder


def random_encoder(path, *overrides, seed=0):
    """Writes `encoder.safetensors` of a tiny quickstart, a ResNet-8 on 16 px views; returns its path."""
    config = load_config("quickstart", ["views.size=16", "model.width=8", *overrides])
    torch.manual_seed(seed)
    encoder = build_encoder(config.model.encoder, config.model.stem, config.model.width, zero_init_residual=False)
    save_encoder(encoder, describe_encoder(config, 7, None), path)
    return path
