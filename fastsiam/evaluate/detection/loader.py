"""Images and targets for a detector: flipped and resized at random for training, as they are for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastsiam.data.decode import decode
from fastsiam.data.sources.image_header import BadImageError
from fastsiam.errors import UserError
from fastsiam.evaluate.detection.annotations import AnnotatedImage


@dataclass(frozen=True)
class Draw:
    """Image `index` at place `position` of the training; the place and the seed alone decide how it is augmented."""

    index: int
    position: int


class Draws(Sampler):
    """`Draw`s of one rank without end: every image once in a random order, then once in another.

    Rank r of R gets the places r, r + R, ...; a resumed run begins at place `start`.
    """

    def __init__(self, count: int, seed: int, rank: int, size: int, start: int):
        self._count, self._seed, self._rank, self._size, self._start = count, seed, rank, size, start

    def __iter__(self) -> Iterator[Draw]:
        epoch, order = -1, np.empty(0)
        position = self._start + self._rank
        while True:
            if position // self._count != epoch:
                epoch = position // self._count
                order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
            yield Draw(int(order[position % self._count]), position)
            position += self._size


class TrainingImages(Dataset):
    """(image uint8 [3, H, W], target) by `Draw`, or the error of a file that cannot be decoded.

    A target has `boxes` fp32 [N, 4] as two corners, `labels` int64 [N] from 1, and where asked for `masks` uint8
    [N, H, W]; N may be 0. Crowds are left out.
    """

    def __init__(self, images: tuple[AnnotatedImage, ...], short_sides, long_side: int, seed: int, masks: bool):
        self._images, self._seed, self._masks = images, seed, masks
        self._transform = v2.Compose(
            [v2.RandomHorizontalFlip(), v2.RandomShortestSize(list(short_sides), long_side, antialias=True)]
        )

    def __len__(self):
        return len(self._images)

    def __getitem__(self, draw: Draw):
        image = self._images[draw.index]
        try:
            pixels = read_pixels(image)
        except BadImageError as error:
            return UserError(f"--train: {error}", error.code)
        image = image.kept(~image.crowd)
        size = image.height, image.width
        boxes = torch.as_tensor(image.boxes, dtype=torch.float32)
        target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)}
        if self._masks:
            target["masks"] = tv_tensors.Mask(draw_masks(image))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence((self._seed, draw.position)).generate_state(1)[0]))
            pixels, target = self._transform(tv_tensors.Image(pixels), target)
        target = {name: values.as_subclass(torch.Tensor) for name, values in target.items()}
        return pixels.as_subclass(torch.Tensor), target | {"labels": torch.as_tensor(image.labels)}


class ValidationImages(Dataset):
    """(number, image uint8 [3, H, W]) in their own size, or the error of a file that cannot be decoded."""

    def __init__(self, images: tuple[AnnotatedImage, ...]):
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index: int):
        try:
            return index, read_pixels(self._images[index])
        except BadImageError as error:
            return UserError(f"--val: {error}", error.code)


def read_pixels(image: AnnotatedImage) -> torch.Tensor:
    """RGB, uint8 [3, H, W], turned as the boxes expect it; raises `BadImageError`."""
    if not image.as_stored:
        return v2.functional.pil_to_tensor(decode(image.path))
    try:
        with Image.open(image.path) as stored:
            return v2.functional.pil_to_tensor(stored.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImageError(f"{image.path} cannot be decoded: {error}") from error


def draw_masks(image: AnnotatedImage) -> torch.Tensor:
    """uint8 [N, H, W] of the objects' outlines: COCO's polygons, or its run lengths."""
    from pycocotools import mask as coco_mask

    masks = torch.zeros(len(image.boxes), image.height, image.width, dtype=torch.uint8)
    for mask, run_lengths in zip(masks, outlines(image), strict=True):
        mask.copy_(torch.from_numpy(coco_mask.decode(run_lengths)))
    return masks


def outlines(image: AnnotatedImage) -> list[dict]:
    """COCO's compressed run lengths of each object."""
    from pycocotools import mask as coco_mask

    found = []
    for segment in image.segments or ():
        if isinstance(segment, tuple):
            polygons = [polygon.tolist() for polygon in segment]
            found.append(coco_mask.merge(coco_mask.frPyObjects(polygons, image.height, image.width)))
        else:
            packed = isinstance(segment["counts"], str | bytes)
            found.append(segment if packed else coco_mask.frPyObjects(segment, image.height, image.width))
    return found


def training_loader(images: TrainingImages, batch_size: int, workers: int, draws: Draws) -> DataLoader:
    """Batches without end: lists of `batch_size` images and of their targets."""
    return DataLoader(images, batch_size, sampler=draws, num_workers=workers, collate_fn=_lists, pin_memory=_pinned())


def validation_loader(images: ValidationImages, batch_size: int, workers: int, numbers: range) -> DataLoader:
    """The images of `numbers`: lists of numbers and of images."""
    return DataLoader(images, batch_size, sampler=numbers, num_workers=workers, collate_fn=_lists, pin_memory=_pinned())


def sound(batch: tuple | UserError) -> tuple[list, list]:
    """The two lists of a batch; raises the `UserError` of a file that could not be decoded."""
    if isinstance(batch, UserError):
        raise batch
    return batch


def _pinned():
    return torch.cuda.is_available()


def _lists(rows):
    # Raised in a worker process, it would lose its code on the way.
    error = next((row for row in rows if isinstance(row, UserError)), None)
    return error or tuple(map(list, zip(*rows, strict=True)))
