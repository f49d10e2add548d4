"""Evaluation during training, kNN accuracy and collapse measures, both in evaluation mode."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F

from fastsiam.config import Config
from fastsiam.data import rng
from fastsiam.data.build import build_evaluation_loader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import UserError
from fastsiam.evaluate import spectrum
from fastsiam.evaluate.collapse import PROBE_IMAGES, Measures, measure
from fastsiam.evaluate.gallery import Pictures
from fastsiam.evaluate.knn import extract, knn_accuracy, nearest
from fastsiam.evaluate.online_linear import OnlineLinear
from fastsiam.runtime.runtime import Runtime

# Two views a step with momentum 0.1 leave 0.5 % of the initial running statistics after 25 steps.
FILL_STEPS = 25
# Raw pixels are compared at no more than this side, which bounds the bank at 12 kB an image.
PIXEL_SIDE = 32
# Training images whose features' spectrum is measured: twice the width of ResNet-50.
SPECTRUM_IMAGES = 4096


class OnlineEvaluation:
    """Measures a method on fixed images and leaves it in the mode in which it was."""

    def __init__(
        self,
        config: Config,
        train: ImageSource,
        val: ImageSource | None,
        skips: tuple[SkipList | None, SkipList | None],
        runtime: Runtime,
        beat: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        """`skips`: the excluded images of `train` and those of `val`.

        kNN is the work of all ranks, which have to ask for it together. `beat()` is called at every batch.
        """
        self._config, self._runtime, self._beat = config, runtime, beat
        more = {"device": runtime.device, "dtype": runtime.dtype, "world_size": runtime.world.size, "say": say}
        self._train = build_evaluation_loader(config, train, skip=skips[0], **more)
        self._val = None
        if val is not None:
            self._val = build_evaluation_loader(config, val, skip=skips[1], **more)
            self._val_label = torch.tensor([train.classes.index(name) for name in val.classes])
        self._probe_indices = rng.probe_indices(config.train.seed, len(train), PROBE_IMAGES)
        self._probe = None
        order = np.random.default_rng(config.train.seed).permutation(len(train))
        self._spectrum_indices = np.sort(order[:SPECTRUM_IMAGES])
        self.spectrum_of_knn: tuple[spectrum.Spectrum, int] | None = None
        """Of the features of the last kNN that was given `pictures`, and the number of images; None if not finite."""

    @property
    def has_knn(self) -> bool:
        return self._val is not None

    def knn(
        self, encoder, pictures: Pictures | None = None, step: int = 0, linear: OnlineLinear | None = None
    ) -> float:
        """kNN top-1 in percent of an encoder's pooled features, val images against train images.

        `pictures`, of all ranks or of none, take the features of `step`, and `linear` is measured on them.
        """
        with evaluation_mode(encoder):
            return self._knn(encoder, pictures, step, linear)

    def spectrum(self, encoder) -> tuple[spectrum.Spectrum, int] | None:
        """Spectrum of an encoder's pooled features of some training images, and their number, without kNN.

        None where there are fewer than two, and where features are not finite.
        """
        part = self._spectrum_indices[self._runtime.world.share_of(len(self._spectrum_indices))]
        with evaluation_mode(encoder):
            features, _, _ = self._extract_part(encoder, self._train, part)
        self.close()
        return self._spectrum_of(features)

    def raw_pixels(self) -> float:
        """The same kNN on the pixels themselves, pooled to at most 32 px."""
        side = min(self._config.views[0].full_size, PIXEL_SIDE)
        return self._knn(lambda views: F.adaptive_avg_pool2d(views.float(), side).flatten(1))

    def untrained(self, method, loader) -> float:
        """The same kNN on a copy of `method` whose batch-norm statistics have seen data but whose weights have not.

        Fresh statistics would let any training look good: they alone move a random network's kNN.
        """
        control = copy.deepcopy(method)
        batches = chain.from_iterable(loader.epoch(epoch) for epoch in range(FILL_STEPS))
        with torch.no_grad():
            for batch in self._watched(islice(batches, FILL_STEPS)):
                with self._runtime.autocast():
                    control.encoded(batch.views)
        return self.knn(control.encoder)

    @torch.no_grad()
    def collapse(self, method) -> Measures:
        """The collapse measures of z on the probe images."""
        if self._probe is None:
            self._probe = [batch.images for batch in self._train.batches(self._probe_indices)]
        with evaluation_mode(method):
            parts = []
            for views in self._probe:
                with self._runtime.autocast():
                    parts.append(method.embed(views).float())
        return measure(torch.cat(parts))

    def close(self) -> None:
        """Free the decoders; the next measurement begins with new ones."""
        self._train.backend.close()
        if self._val:
            self._val.backend.close()

    def _knn(self, encoder, pictures=None, step=0, linear=None) -> float:
        try:
            return self._votes(encoder, pictures, step, linear)
        except torch.OutOfMemoryError:
            pass
        # Outside the handler: the traceback would hold what did not fit.
        images = len(self._train.source)
        raise UserError(
            f"train.batch_size: {self._runtime.device.type} out of memory in kNN, which keeps features of {images:,} "
            "images beside the training; set a smaller train.batch_size, or data.val=null for no kNN",
            "out-of-memory-in-knn",
        )

    def _votes(self, encoder, pictures, step, linear):
        settings, world = self._config.evaluate, self._runtime.world
        bank, bank_labels, bank_indices = self._extract(encoder, self._train)
        queries, query_labels, query_indices = self._extract(encoder, self._val)
        self.close()
        if pictures is not None:
            among = torch.from_numpy(np.isin(bank_indices, self._spectrum_indices))
            self.spectrum_of_knn = self._spectrum_of(bank[among])
            looked_at = torch.from_numpy(np.isin(query_indices, pictures.chosen()))
            chosen, images, where = map(world.gather, (queries[looked_at], bank_indices, query_indices[looked_at]))
            if len(chosen) and len(images):

                def neighbours(queries, count):
                    similarity, places = nearest(bank, queries, count, world)
                    return similarity.cpu().numpy(), images[places.cpu()].numpy()

                pictures.evaluated(step, chosen, where.numpy(), neighbours, self._thumbnails)
        truth = self._val_label[query_labels]
        if linear is not None:
            linear.validate(queries, truth)
        votes = {"k": settings.knn_k, "temperature": settings.knn_temperature, "world": world}
        return knn_accuracy(bank, bank_labels, queries, truth, **votes)

    def _spectrum_of(self, features):
        """Of the features of all ranks: the first measures."""
        features, world = self._runtime.world.gather(features), self._runtime.world
        found = None
        if world.is_first and len(features) > 1 and features.isfinite().all():
            found = spectrum.measure(features), len(features)
        return world.share(found)

    def _extract(self, encoder, loader):
        """Features, labels and indices of this rank's part of the images that have a label."""
        part = np.arange(len(loader.source))[self._runtime.world.share_of(len(loader.source))]
        return self._extract_part(encoder, loader, part[loader.source.labels[part] >= 0])

    def _extract_part(self, encoder, loader, part):
        if loader.skip.mask[part].all():
            none = torch.empty(0, dtype=torch.int64)
            return torch.empty(0, dtype=torch.float16, device=self._runtime.device), none, none
        indices = []
        most = int((~loader.skip.mask[part]).sum())
        features, labels = extract(encoder, self._watched(loader.batches(part), indices), self._runtime.autocast, most)
        return features, labels, torch.from_numpy(np.concatenate(indices))

    def _thumbnails(self, source, indices):
        """The evaluation crops of some images, normalised."""
        loader = self._train if source is self._train.source else self._val
        crops = torch.cat([batch.images for batch in self._watched(loader.batches(indices))])
        loader.backend.close()
        return crops

    def _watched(self, batches, indices=None):
        """The batches, with a beat at each; their `indices` are added to a list where one is given."""
        for batch in batches:
            self._beat()
            if indices is not None:
                indices.append(batch.indices)
            yield batch


@contextlib.contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the mode of before after it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
