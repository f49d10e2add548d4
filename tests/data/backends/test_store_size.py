"""The side of stored images that is chosen where nobody chooses one."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fastsiam.config import load_config
from fastsiam.data.backends.store_size import choose_store_size
from fastsiam.data.sources.open import open_source
from fastsiam.train import main


def sized(tmp_path, sizes):
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number:03d}.png")
    return open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "views", "size"),
    [
        ([(32, 32)] * 3, "size=32", 32),  # CIFAR
        ([(48, 48)] * 3, "size=32", 48),  # no detail lost
        ([(90, 40), (60, 60), (10, 10)], "size=32", 60),  # the median
        ([(500, 375)] * 3, "size=32", 72),  # the smallest crop, of a fifth, in pixels of a view
        ([(20, 20)] * 3, "size=16..32", 32),  # no less than a view
    ],
)
def test_a_store_size_is_chosen_by_the_sizes_of_images_and_views(tmp_path, sizes, views, size):
    assert choose_store_size(sized(tmp_path, sizes), load_config("quickstart", [f"views.{views}"]).views) == size


def test_of_as_many_images_as_imagenet_has_a_view_is_stored(tmp_path):
    source = sized(tmp_path, [(500, 375)])
    many = dataclasses.replace(source, names=np.tile(source.names, 1_281_167))
    assert choose_store_size(many, load_config("r50_160px_resident").views) == 160
    fewer = dataclasses.replace(source, **{
        key: np.tile(getattr(source, key), (20_000, 1) if key == "image_sizes" else 20_000)
        for key in ("names", "file_sizes", "labels", "image_sizes", "kinds")
    }, cached_kinds=None)  # fmt: skip
    assert choose_store_size(fewer, load_config("r50_160px_resident").views) == 258  # 4 GB


def test_a_run_from_memory_needs_no_store_size(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny("data.backend=resident", "train.max_steps=1")]) == 0
    said = capsys.readouterr().out
    assert "store     squares of 36 px" in said
    assert "80 images of 36 px" in said
