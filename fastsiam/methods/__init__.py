"""Methods of self-supervised learning, one file each; `base.Method` is their contract."""

import torch

from fastsiam.config import Config
from fastsiam.config.method_sections import SimSiamConfig
from fastsiam.methods.alternating import Alternating, Average
from fastsiam.methods.base import Layout, Method
from fastsiam.methods.byol import BYOL
from fastsiam.methods.moco import MoCo
from fastsiam.methods.simclr import SimCLR
from fastsiam.methods.simsiam import SimSiam
from fastsiam.methods.swav import SwAV
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.encoder import build_encoder
from fastsiam.models.heads import build_predictor, build_projector
from fastsiam.models.recompute import recompute_activations
from fastsiam.models.residual import fuse_pointwise, fuse_residual_blocks


def build_method(config: Config, world_size: int = 1, rank: int = 0) -> Method:
    """Returns the method of a config in training mode, in fp32 on the CPU.

    `world_size`: the number of ranks that share a batch; above 1 its training-mode statistics are those of all ranks.
    Raises `UserError` where train.checkpoint_activations finds nothing to recompute, and model.fused_pointwise nothing
    to fuse.
    """
    model, heads = config.model, config.method
    layout = Layout(tuple(group.count for group in config.view_groups), rank, world_size)
    encoder = build_encoder(model.encoder, model.stem, model.width, model.zero_init_residual)
    method = _assembled(heads, encoder, layout)
    if model.bn_statistics == "per_view":
        split_statistics(method, layout.num_views, world_size)
    elif world_size > 1:
        split_statistics(method, 1, world_size)
    fuse_residual_blocks(method)
    if model.fused_pointwise:
        fuse_pointwise(method, model.encoder)
    if config.train.checkpoint_activations:
        recompute_activations(method.encoder, model.encoder)
    return method


def loss_is_fused(config: Config, device: torch.device) -> bool:
    """Returns True where the loss of a config is one of our kernels on `device`; otherwise it is plain torch."""
    method, num_views = config.method, sum(group.count for group in config.view_groups)
    if device.type != "cuda" or method.name == "swav":
        return False
    if method.name in ("simclr", "moco"):
        return True
    variant = isinstance(method, SimSiamConfig) and method.similarity != "cosine"
    return not variant and (num_views == 2 or getattr(method, "target_views", None) is not None)


def _assembled(heads, encoder, layout):
    dim = heads.projector.out
    projector = build_projector(encoder.num_features, heads.projector)
    match heads.name:
        case "moco":
            return MoCo(encoder, projector, heads, dim, layout)
        case "simsiam_average":
            return Average(encoder, projector, heads, layout)
    predictor = build_predictor(dim, heads.predictor)
    match heads.name:
        case "simsiam":
            return SimSiam(encoder, projector, predictor, heads, layout)
        case "simsiam_alternating":
            return Alternating(encoder, projector, predictor, heads, layout)
        case "byol":
            return BYOL(encoder, projector, predictor, heads, layout)
        case "simclr":
            return SimCLR(encoder, projector, predictor, heads, layout)
        case "swav":
            return SwAV(encoder, projector, predictor, heads, dim, layout)
