"""Fused operations under one import name, `fastsiam.kernels`.

Each public function here has its mathematics in plain torch in `reference.py`, with the same signature and the
suffix `_ref`.
"""

from fastsiam.kernels.augment import augment_views
from fastsiam.kernels.cosine import (
    negative_cosine,
    negative_cosine_all_pairs,
    negative_cosine_asymmetric,
    negative_cosine_mean_target,
)
from fastsiam.kernels.crop import crop_resize
from fastsiam.kernels.nt_xent import info_nce, info_nce_queue, nt_xent
from fastsiam.kernels.pool import max_pool
from fastsiam.kernels.sinkhorn import sinkhorn
from fastsiam.runtime.cache_dirs import place_triton_cache

__all__ = [
    "augment_views",
    "crop_resize",
    "info_nce",
    "info_nce_queue",
    "max_pool",
    "negative_cosine",
    "negative_cosine_all_pairs",
    "negative_cosine_asymmetric",
    "negative_cosine_mean_target",
    "nt_xent",
    "sinkhorn",
]

place_triton_cache()
