"""Detections of the validation images, from all ranks, and pictures of some."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from fastsiam.evaluate.detection.annotations import AnnotatedImage
from fastsiam.evaluate.detection.loader import ValidationImages, read_pixels, sound, validation_loader
from fastsiam.evaluate.detection.precision import Detections
from fastsiam.runtime.runtime import Runtime

# The picture: so many images in a row and in all, pixels of a cell, least score of a box in it.
_COLUMNS, _SHOWN, _CELL, _LEAST_SCORE = 4, 12, 320, 0.5


@torch.no_grad()
def detect(
    model: nn.Module, images: Sequence[AnnotatedImage], runtime: Runtime, batch_size: int, workers: int
) -> list[Detections]:
    """What the model finds on each image, on all ranks, which share the work.

    Raises `UserError` for an image that cannot be decoded.
    """
    world = runtime.world
    numbers = range(world.rank, len(images), world.size)
    loader = validation_loader(ValidationImages(tuple(images)), batch_size, workers, numbers)
    model.eval()
    mine = {}
    with world.together():
        for batch in loader:
            places, pixels = sound(batch)
            with runtime.autocast():
                found = model([one.to(runtime.device).float().div_(255) for one in pixels])
            mine.update((place, _packed(one)) for place, one in zip(places, found, strict=True))
    everything = {place: found for part in world.collect(mine) for place, found in part.items()}
    return [everything[number] for number in range(len(images))]


def _packed(found):
    masks = None
    if "masks" in found:
        from pycocotools import mask as coco_mask

        drawn = (found["masks"][:, 0] > 0.5).byte().cpu().numpy()
        masks = tuple(coco_mask.encode(np.asfortranarray(mask)) for mask in drawn)
    boxes, scores, labels = (found[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
    return Detections(boxes, scores, labels, masks)


def draw(images: Sequence[AnnotatedImage], found: Sequence[Detections], classes: Sequence[str], path: Path) -> None:
    """Writes a picture of some images, evenly spaced: their objects in white, and in colour what was found.

    A box in colour has its class and score, of at least 0.5. Raises `OSError` where the disk refuses.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(_SHOWN, len(images))).round().astype(int))
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new("RGB", (min(_COLUMNS, len(chosen)) * _CELL, rows * _CELL), "black")
    for place, number in enumerate(chosen):
        row, column = divmod(place, _COLUMNS)
        sheet.paste(_cell(images[number], found[number], classes), (column * _CELL, row * _CELL))
    sheet.save(path)


def _cell(image, found, classes):
    pixels = Image.fromarray(read_pixels(image).permute(1, 2, 0).numpy())
    scale = min(_CELL / image.width, _CELL / image.height)
    pixels = pixels.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    pen = ImageDraw.Draw(pixels)
    for box in image.boxes:
        pen.rectangle([scale * edge for edge in box], outline="white", width=2)
    for box, score, label in zip(*found[:3], strict=True):
        if score < _LEAST_SCORE:
            continue
        colour = f"hsl({int(label * 137.5) % 360}, 100%, 50%)"
        corners = [scale * float(edge) for edge in box]
        pen.rectangle(corners, outline=colour, width=2)
        pen.text((corners[0] + 2, corners[1] + 1), f"{classes[label - 1]} {score:.2f}", fill=colour)
    return pixels
