"""data.augment=dali: DALI's own operators with our draws, against the formulas that it documents."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import fastsiam
from fastsiam.config import load_config
from fastsiam.config.views import RECIPES
from fastsiam.data import rng
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources.open import open_source
from tests.support.loaders import LEVELS, RECIPE, jittered
from tests.support.loaders import make as make_loader

# Levels of 0 to 255 are delivered as they are.
EVERYTHING = dataclasses.replace(LEVELS, size=24, solarize=0.4, grayscale=0.3)
NOTHING = dataclasses.replace(EVERYTHING, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)


def make(photos, spec, dtype=torch.float32, skip=None):
    return make_loader(photos, RECIPE, spec=spec, batch_size=8, workers=1, dtype=dtype, skip=skip)


def views(photos, spec, epochs=(0, 1, 2)):
    """All views [B, S, S, 3] of some epochs in float64, and their draws."""
    made = make(photos, spec)
    found, drawn = [], []
    for epoch in epochs:
        for batch in made.epoch(epoch):
            found.append(batch.views[0].permute(0, 2, 3, 1).double())
            drawn += [rng.augment_draws(spec, 0, epoch, batch.indices, view) for view in range(2)]
    return torch.cat(found).numpy(), rng.AugmentDraws.concatenate(drawn)


def to_levels(x):
    return np.clip(np.rint(x), 0, 255)


def twisted(x, brightness, contrast, saturation, turn):
    """color_twist: YIQ's chroma scaled and turned, then contrast about 128, then brightness."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    chroma = saturation * np.array([[1 / max(saturation, 1e-9), 0, 0], [0, cos, sin], [0, -sin, cos]])
    if saturation == 0:
        chroma = np.diag([1.0, 0, 0])
    matrix = np.linalg.inv(to_yiq) @ chroma @ to_yiq
    return to_levels(brightness * (128 + contrast * (x @ matrix.T - 128)))


def blurred(x, sigma):
    """gaussian_blur: a window of 2 * ceil(3 sigma) + 1, the border reflected without its edge."""
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (0, 1):
        padding = [(reach, reach) if axis == other else (0, 0) for other in range(3)]
        padded = np.pad(x, padding, mode="reflect")
        x = np.apply_along_axis(lambda line: np.convolve(line, taps, "valid"), axis, padded)
    return to_levels(x)


def by_formulas(crop, drawn, row):
    brightness, contrast, saturation, turn = drawn.factors[row].astype(np.float64)
    x = twisted(crop, brightness, contrast, 0.0 if drawn.grayscale[row] else saturation, turn)
    if drawn.sigma[row] > 0:
        x = blurred(x, float(drawn.sigma[row]))
    if drawn.solarize[row]:
        x = np.where(x >= 128, 255 - x, x)
    return x[:, ::-1] if drawn.flip[row] else x


def test_views_follow_the_documented_formulas(photos):
    """Two operators that round a half the other way: at most two levels."""
    crops, _ = views(photos, NOTHING)
    found, drawn = views(photos, EVERYTHING)
    assert len(found) == 96
    for used in (drawn.flip, jittered(drawn), drawn.grayscale, drawn.sigma > 0, drawn.solarize):
        assert 10 < used.sum() < 90
    differences = [np.abs(found[row] - by_formulas(crops[row], drawn, row)) for row in range(len(found))]
    assert np.max(differences) <= 2
    assert np.mean(differences) < 0.05


def test_flips_and_greys_are_those_drawn(photos):
    crops, _ = views(photos, NOTHING)
    flipped, drawn = views(photos, dataclasses.replace(NOTHING, flip=0.5))
    assert 20 < drawn.flip.sum() < 76
    assert (flipped == np.where(drawn.flip[:, None, None, None], crops[:, :, ::-1], crops)).all()
    greyed, drawn = views(photos, dataclasses.replace(NOTHING, grayscale=0.5))
    assert 20 < drawn.grayscale.sum() < 76
    spread = np.ptp(greyed, axis=3).max((1, 2))
    assert (spread[drawn.grayscale] <= 1).all()
    assert (greyed[~drawn.grayscale] == crops[~drawn.grayscale]).all()


def test_without_any_draw_views_are_pils_crops(photos):
    """What the other tests compare with; the filter rounds once where Pillow's rounds twice."""
    crops, _ = views(photos, NOTHING, epochs=(0,))
    pil = make_loader(photos, "pil", spec=NOTHING, batch_size=8)
    expected = torch.cat([batch.views[0] for batch in pil.epoch(0)]).permute(0, 2, 3, 1).double().numpy()
    difference = np.abs(crops - expected)
    assert difference.mean() < 0.5
    assert difference.mean((1, 2, 3)).max() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loader_delivers_finished_views(photos, dtype):
    """The levels that the loader's consumer sees are (x / 255 - mean) / std of those tested above."""
    spec = dataclasses.replace(EVERYTHING, mean=RECIPES["simsiam"].mean, std=RECIPES["simsiam"].std)
    made = make(photos, spec, dtype)
    levels, _ = views(photos, EVERYTHING, epochs=(1,))
    batches = list(made.epoch(1))
    assert np.concatenate([batch.indices for batch in batches]).tolist() == rng.epoch_order(0, 1, 16).tolist()
    for batch in batches:
        assert batch.views[0].dtype == dtype
        assert batch.views[0].shape == (16, 3, 24, 24)
        assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (spec.mean, spec.std))
    expected = ((torch.from_numpy(levels) / 255 - mean) / std).permute(0, 3, 1, 2)
    found = torch.cat([batch.views[0] for batch in batches]).double()
    torch.testing.assert_close(found, expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_file_that_cannot_be_decoded_is_replaced_here_too(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    source = open_source(str(tmp_path / "photos"))
    made = make(tmp_path / "photos", EVERYTHING, skip=SkipList(16, 0.1))
    made.source.look(np.arange(16))
    source.path(3).write_bytes(b"no picture")
    delivered = np.concatenate([batch.indices for batch in made.epoch(0)])
    assert len(delivered) == 16
    assert 3 not in delivered
    assert list(made.skip.found) == [3]


def test_a_run_says_what_differs_and_keeps_it(tiny, tmp_path, capsys):
    overrides = tiny("data.augment=dali", "data.backend=dali", "train.max_steps=3", "views.solarize=0.2")
    result = fastsiam.pretrain(load_config("quickstart", overrides))
    assert (result.status, result.step) == ("done", 3)
    said = capsys.readouterr().out
    assert "augmented by DALI: not our augmenter's views; colour in one order" in said
    environment = json.loads((tmp_path / "runs/run/environment.json").read_text())
    assert environment["loader"].endswith("augmented by DALI")
