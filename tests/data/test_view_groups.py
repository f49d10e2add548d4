"""views as a list of groups: two sizes and two recipes from one decode, each as a run of that group alone gives it."""

import dataclasses

import numpy as np
import pytest
import torch

from fastsiam.config import load_config
from fastsiam.config.views import RECIPES, ViewGroup
from fastsiam.data.backends import pil
from fastsiam.data.build import build_loader
from fastsiam.data.decode import decode_image
from fastsiam.errors import UserError
from fastsiam.run.checkpoint import identity
from fastsiam.train import main
from tests.support.loaders import LEVELS, RECIPE, count_decoders, make
from tests.support.runs import lines

BACKENDS = ("dali", "pil", "ffcv", "resident", RECIPE)
LARGE = ViewGroup(2, dataclasses.replace(LEVELS, size=32))
SMALL = ViewGroup(3, dataclasses.replace(LEVELS, size=16, crop_scale=(0.05, 0.2), solarize=0.5, color="matrix"))
# BYOL's and SwAV's groups, small.
BYOL = tuple(ViewGroup(1, dataclasses.replace(RECIPES[name], size=24)) for name in ("byol_1", "byol_2"))
SWAV = (
    ViewGroup(2, dataclasses.replace(RECIPES["swav"], size=32)),
    ViewGroup(6, dataclasses.replace(RECIPES["swav_small"], size=16)),
)
YAML = (
    "views=[{recipe: demo, size: 16..24, color: matrix, count: 2}, "
    "{recipe: simsiam_cifar10, size: 16, color: exact, count: 3}]"
)
pytestmark = pytest.mark.usefixtures("resident_cache")


@pytest.mark.parametrize("groups", [(LARGE, SMALL), BYOL, SWAV], ids=["two sizes", "one size", "multi-crop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_group_is_what_a_run_of_that_group_alone_gives(photos, backend, groups):
    """Bit for bit at two pairs of sizes; views of the second group have the numbers that follow the first one's."""
    full, first = tuple(group.spec.size for group in groups), groups[0].count
    smaller = tuple(size * 3 // 4 for size in full)
    both = make(photos, backend, groups=groups, batch_size=8)
    for asked, sizes in ((None, full), (smaller, smaller), (None, full)):
        specs = [dataclasses.replace(group.spec, size=size) for group, size in zip(groups, sizes, strict=True)]
        # As many views of the second spec as of both groups: the last have the numbers that they have behind the first.
        counts = (first, sum(group.count for group in groups))
        alone = [make(photos, backend, spec=spec, count=n, batch_size=8) for spec, n in zip(specs, counts, strict=True)]
        for batch, one, other in zip(both.epoch(1, sizes=asked), *(made.epoch(1) for made in alone), strict=True):
            assert batch.indices.tolist() == one.indices.tolist()
            shapes = [(8 * group.count, 3, size, size) for group, size in zip(groups, sizes, strict=True)]
            assert [tuple(group.shape) for group in batch.views] == shapes
            assert all(group.is_contiguous(memory_format=torch.channels_last) for group in batch.views)
            assert torch.equal(batch.views[0], one.views[0])
            assert torch.equal(batch.views[1], other.views[0][8 * first :])
        assert both.sizes == sizes
        for made in alone:
            made.close()
    both.close()


@pytest.mark.parametrize("groups", [BYOL, SWAV], ids=["one size", "multi-crop"])
def test_pil_decodes_an_image_once_for_all_groups(photos, monkeypatch, groups):
    decoded = []
    monkeypatch.setattr(pil, "decode_image", lambda *given: decoded.append(given[1]) or decode_image(*given))
    made = make(photos, "pil", groups=groups, batch_size=8)
    images = [index for batch in made.epoch(0) for index in batch.indices.tolist()]
    assert sorted(map(int, decoded)) == sorted(images)


def test_one_of_byols_views_is_blurred_and_one_solarized(photos):
    """Draws of the groups, by their recipes: every first view has a blur, and only second ones are solarized."""
    made = make(photos, "pil", groups=BYOL, batch_size=8)
    first, second = made.drawn(0, np.arange(4000))
    assert (first.sigma > 0).all()
    assert not first.solarize.any()
    # Three standard errors of 4,000 draws.
    assert (second.sigma > 0).mean() == pytest.approx(0.1, abs=0.015)
    assert second.solarize.mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("backend", ["dali", RECIPE])
def test_dalis_graph_has_one_decoder_for_all_groups(photos, monkeypatch, backend):
    decoders = count_decoders(monkeypatch)
    made = make(photos, backend, groups=(LARGE, SMALL), batch_size=8)
    assert sum(len(group) for batch in made.epoch(0) for group in batch.views) == 80
    assert decoders == [("image", "cpu")]
    made.close()


def test_groups_of_a_config_are_read_written_and_read_again(tmp_path):
    config = load_config("quickstart", [YAML, "train.views_grow_at=null", "views.1.count=4", "views.1.hue=0.05"])
    found = [(group.count, group.spec.size, group.spec.hue) for group in config.view_groups]
    assert found == [(2, 24, 0.1), (4, 16, 0.05)]
    assert config.view_groups[1].spec.mean == RECIPES["simsiam_cifar10"].mean
    assert config.view_stages == ((16, 16), (24, 16))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml").views == config.views
    assert config.run.name != load_config("quickstart").run.name


@pytest.mark.parametrize(
    ("overrides", "key", "code"),
    [
        (["views.1.count=3"], None, "unknown-key"),
        ([YAML, "views.size=16"], "views.size", "not-a-section"),
        ([YAML, "views.2.size=16"], "views.2.size", "not-a-section"),
        ([YAML, "views.1.size=0"], "views.size", "bad-view-size"),
        ([YAML, "views.1.cuont=1"], None, "unknown-key"),
        (["views=[]"], "views.count", "out-of-range"),
        (["views.count=1"], "views.count", "out-of-range"),
        (["views.count=0"], "views.count", "out-of-range"),
        (["views.count=2.0"], "views.count", "wrong-type"),
        (["views.count=two"], "views.count", "wrong-type"),
    ],
)
def test_a_mistake_names_its_key(overrides, key, code):
    with pytest.raises(UserError) as error:
        load_config("quickstart", overrides)
    assert (error.value.key, error.value.code) == (key, code)


def test_a_checkpoint_knows_its_groups():
    def known(*overrides):
        from fastsiam.config.views import specs_of_run

        config = load_config("quickstart", ["train.views_grow_at=null", *overrides])
        return identity(None, specs_of_run(config.view_groups, config.view_stages), "dali")["views"]

    changes = ((), (YAML,), (YAML, "views.1.count=2"), (YAML, "views.1.size=24"), (YAML, "views.0.size=24"))
    assert len({known(*overrides) for overrides in changes}) == 5


def test_a_run_of_two_groups_grows_and_measures_at_the_first_ones_size(tiny, tmp_path):
    """Stopped and resumed in mid-epoch, with another size before than after."""
    for steps in (4, "null"):
        assert main(["--config", "quickstart", *tiny(YAML, f"train.max_steps={steps}", "train.epochs=2")]) == 0
    train = [line for line in lines(tmp_path / "runs/run") if line["kind"] == "train"]
    assert {line["view_size"] for line in train} == {16, 24}
    assert (tmp_path / "runs/run/encoder.safetensors").exists()


def test_a_config_of_groups_builds_its_loader(tiny_config):
    made = build_loader(tiny_config("data.backend=synthetic", YAML))
    assert [tuple(group.shape) for group in next(made.epoch(0)).views] == [(16, 3, 24, 24), (24, 3, 16, 16)]
    pair = (
        "views=[{recipe: byol_1, size: 24, color: exact, count: 1}, {recipe: byol_2, size: 24, color: exact, count: 1}]"
    )
    made = build_loader(tiny_config("data.backend=synthetic", pair))
    assert [tuple(group.shape) for group in next(made.epoch(0)).views] == [(8, 3, 24, 24)] * 2
