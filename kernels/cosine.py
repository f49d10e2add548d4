"""The negative cosine losses: one fused launch forward and one backward on CUDA, plain torch on other devices."""

from fastsiam.kernels.cosine_triton import fused
from fastsiam.kernels.reference import (
    negative_cosine_all_pairs_ref,
    negative_cosine_asymmetric_ref,
    negative_cosine_mean_target_ref,
    negative_cosine_ref,
)


def negative_cosine(p1, p2, z1, z2, *, stop_gradient=True, counter=None):
    """Symmetric negative cosine similarity, SimSiam's Eq. 2: D(p1, z2) / 2 + D(p2, z1) / 2.

    `p1`, `p2`, `z1`, `z2`: [N, d], floating point, the predictions and projections of the two views; rows may be
    strided, and p and z may differ in dtype. Returns a scalar in [-1, 1], fp32 or wider, with fp32 arithmetic
    inside. A row of zeros counts as orthogonal to all, as in `F.cosine_similarity`. Gradients reach p1 and p2 only,
    and z1 and z2 too where `stop_gradient` is False. CUDA tensors take the kernel, others plain torch. `counter`, if
    given, spares it a launch: int32 [1] on the same device, zero, and in use by one stream at a time. Raises
    `ValueError` where the shapes are not four times the same [N, d], or where p1 and p2, or z1 and z2, differ in
    dtype.
    """
    shapes = [tuple(x.shape) for x in (p1, p2, z1, z2)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"negative_cosine: p1, p2, z1, z2 must be four tensors [N, d] of one shape, got {shapes}")
    if p1.dtype != p2.dtype or z1.dtype != z2.dtype:
        dtypes = [x.dtype for x in (p1, p2, z1, z2)]
        raise ValueError(f"negative_cosine: p1 and p2 must share a dtype, and z1 and z2, got {dtypes}")
    if not p1.is_cuda:
        return negative_cosine_ref(p1, p2, z1, z2, stop_gradient=stop_gradient)
    return fused([p1, p2], [z2.unsqueeze(0), z1.unsqueeze(0)], stop_gradient, counter)


def negative_cosine_asymmetric(p, z, *, stop_gradient=True):
    """D(p, z), SimSiam's Eq. 1: minus the mean cosine of the rows of p and z, both [N, d].

    The loss of the paper's asymmetric variant (section 4.6), and one half of the symmetric one. Otherwise as
    `negative_cosine`.
    """
    if p.shape != z.shape or p.ndim != 2 or p.numel() == 0:
        shapes = tuple(p.shape), tuple(z.shape)
        raise ValueError(f"negative_cosine_asymmetric: p and z must be two tensors [N, d] of one shape, got {shapes}")
    if not p.is_cuda:
        return negative_cosine_asymmetric_ref(p, z, stop_gradient=stop_gradient)
    return fused([p], [z.unsqueeze(0)], stop_gradient)


def negative_cosine_mean_target(p, z, *, stop_gradient=True):
    """D(p, mean of K targets): `p` [N, d] against the mean over K of `z` [K, N, d].

    The loss of FastSiam (Pototzky, Sultan, Schmidt-Thieme, GCPR 2022), whose target is the mean projection of several
    views. Otherwise as `negative_cosine`.
    """
    if p.ndim != 2 or z.ndim != 3 or z.shape[1:] != p.shape or z.numel() == 0:
        shapes = tuple(p.shape), tuple(z.shape)
        raise ValueError(f"negative_cosine_mean_target: p must be [N, d] and z [K, N, d], got {shapes}")
    if not p.is_cuda:
        return negative_cosine_mean_target_ref(p, z, stop_gradient=stop_gradient)
    return fused([p], [z], stop_gradient)


def negative_cosine_all_pairs(p, z, *, stop_gradient=True):
    """The mean over all ordered pairs i != j of K views of D(p_i, z_j); `p` and `z`: [K, N, d], K at least 2.

    SimSiam's symmetric loss for more than two views; for K = 2 it is Eq. 2, which `negative_cosine` computes in one
    launch. In plain torch on every device: eager mode needs about ten launches whatever K is, the compiler two or
    three. Otherwise as `negative_cosine`.
    """
    if p.shape != z.shape or p.ndim != 3 or len(p) < 2 or p.numel() == 0:
        shapes = tuple(p.shape), tuple(z.shape)
        raise ValueError(f"negative_cosine_all_pairs: p and z must be two tensors [K, N, d] with K > 1, got {shapes}")
    return negative_cosine_all_pairs_ref(p, z, stop_gradient=stop_gradient)
