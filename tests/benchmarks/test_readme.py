"""Code and paths of the README work as written."""

import re

import numpy as np
import torch
from PIL import Image

import fastsiam
from tests.support.processes import REPOSITORY


def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_links_and_folders_of_the_pages_exist():
    pages = [REPOSITORY / "README.md", *REPOSITORY.glob("*/*.md"), *REPOSITORY.glob("*/*/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(((?!https?:|#)[^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)
    (tree,) = re.findall(r"## Folders\n\n```\n(.*?)```", readme(), re.DOTALL)
    named = {word for word in tree.split() if word.endswith("/")}
    packages = {
        f"{path.parent.name}/" for path in REPOSITORY.glob("fastsiam/*/__init__.py") if not path.parent.is_symlink()
    }
    assert packages <= named


def test_the_encoder_is_used_as_the_readme_shows(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fastsiam.pretrain(
        fastsiam.load_config("quickstart", tiny("train.max_steps=1", "run.dir=runs", "run.name=quickstart"))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg", format="PNG")
    blocks = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)
    (block,) = (block for block in blocks if "photo.jpg" in block)
    names = {}
    exec(block, names)
    encoder = fastsiam.load_encoder("runs/quickstart")
    mean, std = torch.tensor([encoder.mean, encoder.std])
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(names["features"], encoder(images))
