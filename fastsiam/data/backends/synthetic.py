"""Delivers a fixed batch on the device: no decoding, no augmentation, no copy. The ceiling that a loader can reach."""

import numpy as np
import torch

from fastsiam.config.views import ViewGroup
from fastsiam.data.backends.base import Batch

IMAGENET_TRAIN_IMAGES = 1_281_167


class SyntheticLoader:
    """Repeats one batch of normally distributed views; an epoch has the length of ImageNet's."""

    def __init__(
        self,
        groups: tuple[ViewGroup, ...],
        *,
        batch_size,
        seed,
        device,
        dtype,
        num_images=IMAGENET_TRAIN_IMAGES,
        world_size=1,
    ):
        """`batch_size` is that of all ranks together, each of which holds its part."""
        self.batch_size, self.groups = batch_size, groups
        self.steps_per_epoch = num_images // batch_size
        self._share, self._seed, self._device, self._dtype = batch_size // world_size, seed, device, dtype
        self.sizes = tuple(group.spec.size for group in groups)
        self._batch = self._drawn()

    def epoch(self, epoch, cursor=0, sizes=None):
        """Yields the batch once for each step of an epoch from `cursor` images on; `sizes` as in `Loader.epoch`."""
        sizes = sizes or tuple(group.spec.size for group in self.groups)
        if sizes != self.sizes:
            self.sizes = sizes
            self._batch = self._drawn()
        for _ in range(cursor // self.batch_size, self.steps_per_epoch):
            yield self._batch

    def _drawn(self):
        generator = torch.Generator().manual_seed(self._seed)
        views = [
            torch.randn(group.count * self._share, 3, size, size, generator=generator)
            for group, size in zip(self.groups, self.sizes, strict=True)
        ]
        return Batch(
            [group.to(self._device, self._dtype, memory_format=torch.channels_last) for group in views],
            torch.full((self._share,), -1),
            np.arange(self._share),
        )
