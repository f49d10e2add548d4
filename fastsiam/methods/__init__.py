"""Methods of self-supervised learning, one file each; `base.Method` is their contract."""

from fastsiam.config import Config
from fastsiam.methods.base import Method
from fastsiam.methods.simsiam import SimSiam
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.encoder import build_encoder
from fastsiam.models.heads import build_predictor, build_projector
from fastsiam.models.recompute import recompute_activations


def build_method(config: Config, world_size: int = 1) -> Method:
    """Returns the method of a config in training mode, in fp32 on the CPU.

    `world_size`: the number of ranks that share a batch; above 1 its training-mode statistics are those of all ranks.
    Raises `UserError` where train.checkpoint_activations finds nothing to recompute.
    """
    model, heads, counts = config.model, config.method, tuple(group.count for group in config.view_groups)
    encoder = build_encoder(model.encoder, model.stem, model.width, model.zero_init_residual)
    if config.train.checkpoint_activations:
        recompute_activations(encoder, model.encoder)
    method = SimSiam(
        encoder,
        build_projector(encoder.num_features, heads.projector.hidden, heads.projector.out, heads.projector.layers),
        build_predictor(heads.projector.out, heads.predictor.hidden),
        stop_gradient=heads.stop_gradient,
        view_counts=counts,
    )
    if model.bn_statistics == "per_view":
        return split_statistics(method, sum(counts), world_size)
    return split_statistics(method, 1, world_size) if world_size > 1 else method
