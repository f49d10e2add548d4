"""HTML page of the nearest neighbours of some images: no script, nothing fetched."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastsiam.data.sources.source import ImageSource, new_source
from fastsiam.embed.features import of_layer
from fastsiam.embed.table import Table
from fastsiam.errors import UserError, printable
from fastsiam.evaluate.gallery import THUMBNAIL_SIDE, to_uint8
from fastsiam.evaluate.knn import nearest
from fastsiam.evaluate.protocols.inputs import Inputs
from fastsiam.report.thumbnails import data_uri
from fastsiam.runtime.files import replace_file

_FOLDER = Path(__file__).parent


@torch.no_grad()
def write_page(
    path: Path, inputs: Inputs, source: ImageSource, table: Table, queries: Sequence[Path], count: int
) -> None:
    """Writes the page of the `count` images of `table` that are most similar to each of `queries`.

    `table`: the features of `source`. Similarity is the cosine of features. Raises `UserError` for an image that cannot
    be decoded, and where the page cannot be written.
    """
    asked = files_source(queries)
    if reasons := asked.look(np.arange(len(asked))):
        raise UserError(f"--neighbours: {next(iter(reasons.values()))}", "unreadable-image")
    encoder = of_layer(inputs.encoder, table.description["layer"])
    images, features = [], []
    for batch in _batches(inputs, asked):
        with inputs.runtime.autocast():
            features.append(encoder(batch.images).float())
        images.append(to_uint8(batch.images, inputs.spec, THUMBNAIL_SIDE))
    bank = torch.from_numpy(np.array(table.features)).to(inputs.runtime.device)
    similarity, places = (found.cpu().numpy() for found in nearest(bank, torch.cat(features), count))
    shown = np.unique(places)
    position = {name: index for index, name in enumerate(_printable_names(source))}
    wanted = np.array([position[name] for name in table.names[shown]])
    crops = np.concatenate(
        [to_uint8(batch.images, inputs.spec, THUMBNAIL_SIDE) for batch in _batches(inputs, source, wanted)]
    )
    crop_of = dict(zip(shown.tolist(), crops, strict=True))
    rows = [
        (
            {"image": data_uri(image), "name": str(query)},
            [_neighbour(table, place, value, crop_of[place]) for place, value in zip(*near, strict=True)],
        )
        for image, query, *near in zip(
            np.concatenate(images), map(printable, map(str, queries)), places.tolist(), similarity.tolist(), strict=True
        )
    ]
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("neighbours.html.j2").render(rows=rows, table=table)
    try:
        replace_file(path, page.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--html: cannot write {path} ({error.strerror or error})", "out-unwritable") from error


def files_source(paths: Sequence[Path]) -> ImageSource:
    """A source of single files anywhere on the disk, without labels."""
    absolute = [os.path.abspath(path) for path in paths]
    return new_source(Path("/"), [(path.lstrip("/"), os.path.getsize(path)) for path in absolute])


def _batches(inputs, source, indices=None):
    loader = inputs.loader(source)
    try:
        yield from loader.batches(indices)
    finally:
        loader.backend.close()


def _printable_names(source):
    return (printable(os.fsdecode(bytes(name))) for name in source.names)


def _neighbour(table, place, similarity, crop):
    label = table.labels[place]
    text = table.classes[label] if label >= 0 else ""
    name = str(table.names[place])
    return {"image": data_uri(crop), "name": name, "label": text, "similarity": f"{similarity:.3f}"}
