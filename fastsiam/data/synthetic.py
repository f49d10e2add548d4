"""A fixed batch on the device: no decoding, no augmentation, no copy. The ceiling that a loader can reach."""

import numpy as np
import torch

from fastsiam.data.loader import Batch

IMAGENET_TRAIN_IMAGES = 1_281_167


class SyntheticLoader:
    """The same normally distributed views in every step; an epoch has the length of ImageNet's."""

    def __init__(self, specs, *, batch_size, seed, device, dtype, num_images=IMAGENET_TRAIN_IMAGES, world_size=1):
        """`batch_size` is that of all processes together, each of which holds its part."""
        self.batch_size = batch_size
        self.steps_per_epoch = num_images // batch_size
        batch_size, size = batch_size // world_size, specs[0].size
        generator = torch.Generator().manual_seed(seed)
        views = torch.randn(len(specs) * batch_size, 3, size, size, generator=generator)
        self._batch = Batch(
            views.to(device, dtype, memory_format=torch.channels_last),
            torch.full((batch_size,), -1),
            np.arange(batch_size),
        )

    def epoch(self, epoch, cursor=0):
        """The batch, once for each step of an epoch from `cursor` images on."""
        for _ in range(cursor // self.batch_size, self.steps_per_epoch):
            yield self._batch
