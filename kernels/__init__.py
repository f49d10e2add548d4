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
from fastsiam.runtime.cache_dirs import place_triton_cache

__all__ = [
    "augment_views",
    "crop_resize",
    "negative_cosine",
    "negative_cosine_all_pairs",
    "negative_cosine_asymmetric",
    "negative_cosine_mean_target",
]

place_triton_cache()
