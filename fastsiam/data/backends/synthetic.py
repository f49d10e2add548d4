"""A fixed batch on the device: no decoding, no augmentation, no copy. The ceiling that a loader can reach."""

import numpy as np
import torch

from fastsiam.data.backends.base import Batch

IMAGENET_TRAIN_IMAGES = 1_281_167


class SyntheticLoader:
    """The same normally distributed views in every step; an epoch has the length of ImageNet's."""

    def __init__(self, specs, *, batch_size, seed, device, dtype, num_images=IMAGENET_TRAIN_IMAGES, world_size=1):
        """`batch_size` is that of all processes together, each of which holds its part."""
        self.batch_size, self.specs = batch_size, specs
        self.steps_per_epoch = num_images // batch_size
        self._share, self._seed, self._device, self._dtype = batch_size // world_size, seed, device, dtype
        self.size = specs[0].size
        self._batch = self._drawn()

    def epoch(self, epoch, cursor=0, size=None):
        """The batch, once for each step of an epoch from `cursor` images on; `size` as in `Loader.epoch`."""
        size = size or self.specs[0].size
        if size != self.size:
            self.size = size
            self._batch = self._drawn()
        for _ in range(cursor // self.batch_size, self.steps_per_epoch):
            yield self._batch

    def _drawn(self):
        generator = torch.Generator().manual_seed(self._seed)
        views = torch.randn(len(self.specs) * self._share, 3, self.size, self.size, generator=generator)
        return Batch(
            views.to(self._device, self._dtype, memory_format=torch.channels_last),
            torch.full((self._share,), -1),
            np.arange(self._share),
        )
