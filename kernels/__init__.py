"""Fused operations under one import name, `fastsiam.kernels`.

Each public function here has its mathematics in plain torch in `reference.py`, with the same signature and the
suffix `_ref`.
"""

from fastsiam.kernels.reference import negative_cosine_ref

__all__ = ["negative_cosine"]


def negative_cosine(p1, p2, z1, z2, *, stop_gradient=True):
    """Symmetric negative cosine similarity, SimSiam's Eq. 2: D(p1, z2) / 2 + D(p2, z1) / 2.

    `p1`, `p2`, `z1`, `z2`: [N, d], floating point, the predictions and projections of the two views. Returns a
    scalar in [-1, 1], fp32 or wider. Gradients reach p1 and p2 only, and z1 and z2 too where `stop_gradient` is
    False. Raises `ValueError` where the shapes are not four times the same [N, d].
    """
    shapes = [tuple(x.shape) for x in (p1, p2, z1, z2)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(f"negative_cosine: p1, p2, z1, z2 must be four tensors [N, d] of one shape, got {shapes}")
    return negative_cosine_ref(p1, p2, z1, z2, stop_gradient=stop_gradient)
