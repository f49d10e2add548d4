"""One file per method: an nn.Module whose forward maps views to a dict with `loss` and detached diagnostics."""

from torch import nn

from fastsiam.config import Config
from fastsiam.methods.simsiam import SimSiam
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.encoder import build_encoder
from fastsiam.models.heads import build_predictor, build_projector


def build_method(config: Config, world_size: int = 1) -> nn.Module:
    """The method of a config in training mode, fp32 on the CPU; `forward(views [V*N, 3, S, S])` gives `loss`, `z`.

    `world_size`: the number of ranks that share a batch; above 1 its training-mode statistics are those of all ranks.
    """
    model = config.model
    encoder = build_encoder(model.encoder, model.stem, model.width, model.zero_init_residual)
    method = SimSiam(
        encoder,
        build_projector(encoder.num_features, model.projector.hidden, model.projector.out, model.projector.layers),
        build_predictor(model.projector.out, model.predictor.hidden),
        stop_gradient=config.method.stop_gradient,
        num_views=config.views.count,
    )
    if model.bn_statistics == "per_view":
        return split_statistics(method, config.views.count, world_size)
    return split_statistics(method, 1, world_size) if world_size > 1 else method
