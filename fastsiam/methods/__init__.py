"""One file per method: an nn.Module whose forward maps views to a dict with `loss` and detached diagnostics."""

from torch import nn

from fastsiam.config import Config
from fastsiam.encoder import build_encoder
from fastsiam.methods.heads import build_predictor, build_projector
from fastsiam.methods.simsiam import SimSiam
from fastsiam.norm import split_statistics

NUM_VIEWS = 2


def build_method(config: Config) -> nn.Module:
    """The method of a config in training mode, fp32 on the CPU; `forward(views [2N, 3, S, S])` gives `loss`, `z`."""
    model = config.model
    encoder = build_encoder(model.encoder, model.stem, model.width, model.zero_init_residual)
    method = SimSiam(
        encoder,
        build_projector(encoder.num_features, model.projector.hidden, model.projector.out, model.projector.layers),
        build_predictor(model.projector.out, model.predictor.hidden),
        stop_gradient=config.method.stop_gradient,
    )
    return split_statistics(method, NUM_VIEWS) if model.bn_statistics == "per_view" else method
