"""views.size: LOW..HIGH: which sizes, and when; test_view_groups.py has the views of every backend at two sizes."""

import dataclasses
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils import data as torch_data

from fastsiam.config import load_config
from fastsiam.config.views import ViewGroup, sizes_at, sizes_between, specs_of_run, stages_of
from fastsiam.data.backends.synthetic import SyntheticLoader
from fastsiam.data.bottleneck import describe
from fastsiam.data.build import build_loader, check_grows
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.run.checkpoint import identity
from tests.support.loaders import CPU, LEVELS, SIZE, SPEC, make
from tests.support.refusals import refuses


@pytest.mark.parametrize(
    ("ends", "sizes"),
    [
        ((128, 224), (128, 160, 192, 224)),
        ((96, 224), (96, 128, 160, 192, 224)),
        ((64, 224), (64, 128, 192, 224)),
        ((32, 512), (32, 128, 256, 384, 512)),
        ((160, 192), (160, 192)),
        ((16, 32), (16, 24, 32)),
        ((8, 64), (8, 16, 32, 48, 64)),
        ((100, 130), (100, 128, 130)),
        ((31, 32), (31, 32)),
    ],
)
def test_between_the_ends_lie_multiples_of_32_or_8(ends, sizes):
    assert sizes_between(*ends) == sizes


def test_there_are_never_more_than_five_sizes():
    for low in range(1, 300, 7):
        for high in range(low + 1, 700, 13):
            sizes = sizes_between(low, high)
            assert 2 <= len(sizes) <= 5
            assert sizes == tuple(sorted(set(sizes)))
            assert (sizes[0], sizes[-1]) == (low, high)


def in_epochs(number, sizes=(128, 160, 192, 224)):
    """The size of each epoch where all are alike; `number` need not be whole."""
    starts = np.arange(int(np.ceil(number))) / number
    return [sizes_at(stages_of([sizes]), epoch, float(start))[0] for epoch, start in enumerate(starts)]


def test_sizes_but_the_last_share_four_fifths_of_the_run():
    assert in_epochs(100) == 27 * [128] + 26 * [160] + 27 * [192] + 20 * [224]
    assert in_epochs(16) == 4 * [128] + 4 * [160] + 4 * [192] + 4 * [224]
    assert in_epochs(5, (16, 24, 32)) == [16, 16, 24, 24, 32]
    assert in_epochs(800, (16, 32)) == 640 * [16] + 160 * [32]


def test_sizes_begin_at_the_shares_that_a_config_names(tmp_path):
    config = load_config("quickstart", ["views.size=16..32", "train.views_grow_at=[0.7, 0.9]", "train.epochs=100"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for known in (config, load_config(tmp_path / "config.yaml")):
        sizes = [known.sizes_at(epoch, epoch / 100)[0] for epoch in range(100)]
        # Counted from the first epoch to the last, which has the full size: 69.3 and 89.1 are 70 and 90 % of 99.
        assert sizes == 70 * [16] + 20 * [24] + 10 * [32]


@pytest.mark.parametrize("starts", ["[0.5]", "[0.9, 0.7]", "[0.5, 0.5]", "[]"])
def test_each_size_needs_its_start_in_order(starts):
    with refuses("starts-of-sizes", "train.views_grow_at") as error:
        load_config("quickstart", ["views.size=16..32", f"train.views_grow_at={starts}"])
    cure = "is not one share for each of 24 px, 32 px, in order; set train.views_grow_at=[0.4, 0.8], or null for these"
    assert str(error.value).endswith(cure)


def test_the_starts_of_a_config_mean_nothing_to_views_of_one_size():
    config = load_config("quickstart", ["views.size=40"])
    assert config.train.views_grow_at == (0.5, 0.9)
    assert {config.sizes_at(epoch, epoch / 8) for epoch in range(8)} == {(40,)}


def test_the_last_epoch_has_the_full_size_however_few_there_are():
    assert in_epochs(2) == [128, 224]
    assert in_epochs(3) == [128, 160, 224]
    for number in np.arange(1.01, 60, 0.37):
        sizes = in_epochs(number)
        assert sizes == sorted(sizes)
        assert (sizes[0], sizes[-1]) == (128, 224)


def test_without_progress_and_at_the_end_there_is_a_size():
    sizes = (128, 160, 192, 224)
    # Where the clock has hardly moved in the first epochs, and where it has run out in the first.
    at = functools.partial(sizes_at, stages_of([sizes]))
    assert (at(3, 0.0), at(1, 1.0), at(7, 1.0)) == ((128,), (224,), (224,))
    assert {sizes_at(((224,),), epoch, epoch / 9) for epoch in range(9)} == {(224,)}


def test_groups_grow_in_the_same_stages():
    stages = stages_of([(128, 160, 192, 224), (96,), (64, 96)])
    assert stages == ((128, 96, 64), (160, 96, 64), (192, 96, 64), (224, 96, 96))
    assert [sizes_at(stages, epoch, epoch / 4) for epoch in range(4)] == list(stages)


@pytest.mark.parametrize(
    "value",
    ["224..128", "128..128", "128-224", "128..", "[128, 224]", "0", "-8", "0..32", "32.5", "true", "null", "6..32"],
)
def test_a_mistake_is_one_sentence(value):
    with refuses("too-small-to-blur" if value == "6..32" else "bad-view-size", "views.size") as error:
        load_config("r50_100ep", [f"views.size={value}"])
    assert "\n" not in str(error.value)


def test_a_range_is_read_written_and_read_again(tmp_path):
    config = load_config("r50_100ep", ["views.size=128 .. 224"])
    assert (config.views[0].size, config.views[0].full_size) == ("128..224", 224)
    assert config.views[0].sizes == (128, 160, 192, 224)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml").views == config.views
    (fixed,) = load_config("r50_100ep").views
    assert (fixed.size, fixed.sizes, fixed.full_size) == (224, (224,), 224)


def test_a_single_epoch_has_the_full_size():
    assert load_config("quickstart", ["views.size=16..32", "train.epochs=1"]).sizes_at(0, 0.0) == (32,)
    assert load_config("quickstart", ["views.size=16..32", "train.epochs=2"]).sizes_at(0, 0.0) == (16,)


def test_the_quickstart_has_the_epochs_of_each_size_that_it_was_measured_with():
    config = load_config("quickstart")
    sizes = [config.sizes_at(epoch, epoch / 8)[0] for epoch in range(config.train.epochs)]
    assert sizes == 4 * [20] + 3 * [24] + [32]


def test_a_budget_of_one_epoch_is_refused():
    def grows(*overrides):
        check_grows(load_config("quickstart", ["views.size=16..32", *overrides]), steps_per_epoch=10)

    grows("train.epochs=1")
    grows("budget=81 images", "train.batch_size=8")
    grows("budget=1s")
    check_grows(load_config("quickstart", ["views.size=32", "budget=80 images", "train.batch_size=8"]), 10)
    with pytest.raises(UserError) as error:
        grows("budget=80 images", "train.batch_size=8")
    assert (error.value.key, error.value.code) == ("views.size", "no-epochs-to-grow")
    with pytest.raises(UserError) as error:
        build_loader(load_config("quickstart", ["data.backend=synthetic", "views.size=16..32", "budget=64 images"]))
    assert error.value.code == "no-epochs-to-grow"


def views_of(config):
    return identity(None, specs_of_run(config.view_groups, config.view_stages), "dali")["views"]


def test_a_checkpoint_knows_the_range_and_a_fixed_size_is_known_as_ever():
    def known(*overrides):
        return views_of(load_config("quickstart", ["views.size=32", "train.views_grow_at=null", *overrides]))

    (group,) = load_config("quickstart", ["views.size=32"]).view_groups
    assert known() == identity(None, (group.spec,) * 2, "dali")["views"]
    ranges = ("views.size=16..32", "views.size=24..32", "views.size=16", "views.size=16..40", "views.count=3")
    assert len({known(), *map(known, ranges)}) == 6


@pytest.mark.parametrize(
    ("name", "overrides", "known"),
    [
        ("r50_100ep", ["views.blur_kind=gaussian"], "85078a9113f7663d"),
        ("r50_100ep", ["views.blur_kind=gaussian", "views.size=128..224", "views.solarize=0.25"], "bc87f8bedf0d574e"),
        ("r18_cifar10_800ep", [], "f3d51b1b9fe8686a"),
        ("quickstart", ["views.size=32"], "9772e1337421c53a"),
    ],
)
def test_checkpoints_from_before_there_was_a_kind_of_blur_are_known(name, overrides, known):
    """What a checkpoint of commit e21b2b9 holds; without a blur its kind changes nothing."""
    config = load_config(name, overrides)
    specs = specs_of_run(config.view_groups, config.view_stages)
    assert views_of(config) == known
    pil = tuple(dataclasses.replace(spec, blur=0.5, blur_kind="pil") for spec in specs)
    assert identity(None, pil, "dali")["views"] != known


def test_what_is_stored_is_advised_for_the_full_size(tiny_config, demo_folder):
    source = open_source(str(demo_folder / "train"))
    assert describe(tiny_config("views.size=16..28"), source, "dali", CPU).store_size == 32


def of_size(photos, backend, size):
    return make(photos, backend, spec=dataclasses.replace(LEVELS, size=size))


def test_a_change_keeps_dalis_graph_which_only_decodes_and_frees_ffcvs_memory(photos):
    made = of_size(photos, "dali", 32)
    list(made.epoch(0, sizes=(16,)))
    graph = made.backend._pipeline
    list(made.epoch(1, sizes=(24,)))
    assert made.backend._pipeline is graph

    made = of_size(photos, "ffcv", 32)
    list(made.epoch(0, sizes=(16,)))
    assert made.backend._slots[0].shape[-2:] == (16, 48)
    made.backend.resize((24,))
    assert made.backend._slots is None


def test_a_change_ends_pils_processes(photos, monkeypatch):
    """The iterator that owns them is gone, whose finaliser ends them; none is started here, which takes seconds."""
    made = of_size(photos, "pil", 32)
    list(made.epoch(0, sizes=(16,)))
    loader = made.backend._loader
    assert isinstance(loader, torch_data.DataLoader)
    gone = weakref.ref(loader)
    del loader
    made.backend.resize((24,))
    gc.collect()
    assert gone() is None


def test_synthetic_views_have_the_size_asked_for():
    groups = (ViewGroup(3, SPEC),)
    numbers = {"batch_size": 4, "seed": 5, "device": "cpu", "dtype": torch.bfloat16, "num_images": 8}
    made = SyntheticLoader(groups, **numbers)
    for size in (16, 24, None):
        views = [batch.views[0] for batch in made.epoch(0, sizes=size and (size,))]
        assert len(views) == 2
        assert views[0].shape == (12, 3, size or SIZE, size or SIZE)
        expected = SyntheticLoader((ViewGroup(3, dataclasses.replace(SPEC, size=size or SIZE)),), **numbers)
        assert torch.equal(views[1], next(expected.epoch(0)).views[0])
        assert made.sizes == (size or SIZE,)
