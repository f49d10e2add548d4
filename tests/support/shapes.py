"""Drawn images with coloured shapes on noise, as data sets in COCO's and in VOC's format."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = ("disc", "square", "triangle")


def draw_shape(pen, name, box, colour):
    left, top, right, bottom = box
    if name == "disc":
        pen.ellipse(box, fill=colour)
    elif name == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


def background(generator, side):
    coarse = generator.integers(60, 150, (side // 4, side // 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def shape_image(generator, side, count, sizes=(18, 28)):
    """An image of `side` pixels and its shapes, [(name, (left, top, right, bottom))], which do not overlap."""
    image, found = background(generator, side), []
    pen = ImageDraw.Draw(image)
    for _ in range(100):
        if len(found) == count:
            break
        size = int(generator.integers(*sizes))
        left, top = (int(place) for place in generator.integers(1, side - size - 1, 2))
        box = (left, top, left + size, top + size)
        if all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for _, b in found):
            name = NAMES[generator.integers(len(NAMES))]
            colour = tuple(int(level) for level in generator.integers(0, 256, 3))
            draw_shape(pen, name, box, colour)
            found.append((name, box))
    return image, found


def write_coco(folder: Path, count: int, seed: int, side: int = 64) -> Path:
    """Writes `count` images and their JSON file, whose path it returns; its category ids are 10, 20 and 30."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, images, annotations = np.random.default_rng(seed), [], []
    for number in range(1, count + 1):
        image, shapes = shape_image(generator, side, int(generator.integers(1, 4)))
        image.save(folder / f"{number:04d}.png")
        images.append({"id": number, "file_name": f"{number:04d}.png", "width": side, "height": side})
        for name, (left, top, right, bottom) in shapes:
            width, height = right - left + 1, bottom - top + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 10 * (1 + NAMES.index(name)),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [[left, top, right + 1, top, right + 1, bottom + 1, left, bottom + 1]],
                }
            )
    categories = [{"id": 10 * (1 + place), "name": name} for place, name in enumerate(NAMES)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_voc(folder: Path, splits: dict[str, int], seed: int) -> dict[str, list]:
    """Writes splits of so many images with white squares; returns [(name, first and last pixels, difficult)] by stem.

    The squares of an image do not overlap; its first one is difficult where there are two.
    """
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    generator, known = np.random.default_rng(seed), {}
    for split, count in splits.items():
        stems = [f"{split}{number}" for number in range(count)]
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for stem in stems:
            pixels = np.zeros((50, 80, 3), np.uint8)
            rows = []
            for place in range(1 + len(known) % 2):
                left, top = 40 * place + int(generator.integers(0, 10)), int(generator.integers(0, 20))
                right, bottom = left + 20, top + 15
                pixels[top : bottom + 1, left : right + 1] = 255
                rows.append((("cat", "dog")[place], (left, top, right, bottom), place == 0 and len(known) % 2 == 1))
            # Without loss, whatever the file is called.
            Image.fromarray(pixels).save(folder / f"JPEGImages/{stem}.jpg", "PNG")
            objects = "".join(
                f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{box[0] + 1}</xmin>"
                f"<ymin>{box[1] + 1}</ymin><xmax>{box[2] + 1}</xmax><ymax>{box[3] + 1}</ymax></bndbox></object>"
                for name, box, difficult in rows
            )
            size = "<size><width>80</width><height>50</height></size>"
            (folder / f"Annotations/{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
            known[stem] = rows
    return known
