"""What the README says to type, typed."""

import re

import numpy as np
import torch
from PIL import Image

import fastsiam
from tests.support.processes import REPOSITORY


def test_the_encoder_is_used_as_the_readme_and_the_last_lines_say(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fastsiam.pretrain(
        fastsiam.load_config("quickstart", tiny("train.max_steps=1", "run.dir=runs", "run.name=quickstart"))
    )
    said = capsys.readouterr().out
    assert "encoder   runs/quickstart/encoder.safetensors: " in said
    assert all(word in said for word in ("fastsiam.load_encoder", "encoder.mean", "encoder.std"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg", format="PNG")
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if "photo.jpg" in block)
    names = {}
    exec(block, names)
    encoder = fastsiam.load_encoder("runs/quickstart")
    mean, std = torch.tensor([encoder.mean, encoder.std])
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(names["features"], encoder(images))
