"""Configs are found, read and checked; every mistake is one sentence and exit code 2 before torch is imported."""

import copy
import functools

import pytest
import yaml

from fastsiam.config import CONFIGS, OPERATIONAL, Config, differences, differing_keys, load_config
from fastsiam.config.schema import EvaluateConfig
from fastsiam.config.yaml_file import apply_override, check, flat, nearest_key, one_sentence, read, schema_keys
from fastsiam.errors import UserError
from tests.support.processes import MASKED, run_python
from tests.support.refusals import printed_error, refuses, refuses_overrides

# Overrides of r50_100ep, and the key and code of the error.
MISTAKES = {
    "unknown key": (["data.trian=x"], None, "unknown-key"),
    "section as value": (["train=3"], "train", "not-a-section"),
    "section below a value": (["train.epochs.x=3"], "train.epochs.x", "not-a-section"),
    "no override": (["train.epochs"], None, "not-an-override"),
    "unreadable value": (["train.epochs=[1"], "train.epochs", "not-yaml"),
    "wrong type": (["train.epochs=many"], "train.epochs", "wrong-type"),
    "fraction for an integer": (["train.epochs=1.5"], "train.epochs", "wrong-type"),
    "boolean for an integer": (["train.epochs=true"], "train.epochs", "wrong-type"),
    "out of range": (["views.flip=1.5"], "views.flip", "out-of-range"),
    "negative batch": (["train.batch_size=-4"], "train.batch_size", "out-of-range"),
    "an infinite rate": (["optimizer.base_lr=1e400"], "optimizer.base_lr", "out-of-range"),
    "an infinite price": (["budget_price_per_hour=.inf"], "budget_price_per_hour", "out-of-range"),
    "an infinite mean": (["views.mean=[.nan, 0, 0]"], "views.mean", "out-of-range"),
    "unknown choice": (["data.backend=dalli"], "data.backend", "unknown-choice"),
    "unknown optimizer": (["optimizer.name=adam"], "optimizer.name", "unknown-choice"),
    "a crop beyond the image": (["views.crop_scale=[0.2, 1.1]"], "views.crop_scale", "out-of-range"),
    "a blur beyond the taps": (["views.blur_sigma=[0.1, 2.1]"], "views.blur_sigma", "out-of-range"),
    "a deviation of zero": (["views.std=[0.2, 0, 0.2]"], "views.std", "out-of-range"),
    "mapping for a name": (["views.recipe={a: b}"], "views.recipe", "unknown-choice"),
    "list for a name": (["train.device=[cpu]"], "train.device", "unknown-choice"),
    "unknown encoder": (["model.encoder=resnet51"], "model.encoder", "unknown-encoder"),
    "impossible depth": (["model.encoder=cifar_resnet10"], "model.encoder", "unknown-encoder"),
    "no width": (["model.encoder=cifar_resnet20"], "model.encoder", "no-width"),
    "a width of ResNet-50": (["model.width=16"], "model.width", "width-is-fixed"),
    "dali's recipe elsewhere": (["data.augment=dali", "data.backend=pil"], "data.augment", "augment-without-dali"),
    "dali's recipe by chance": (["data.augment=dali"], "data.augment", "augment-without-dali"),
    "apex with lars": (
        ["optimizer.name=lars", "optimizer.implementation=apex"], "optimizer.implementation", "apex-with-lars",
    ),
    "apex with scaled gradients": (
        ["optimizer.implementation=apex", "train.precision=fp16"], "optimizer.implementation", "apex-with-fp16",
    ),
    "a ratio without lars": (["optimizer.lars_trust=0.01"], "optimizer.lars_trust", "trust-without-lars"),
    "deep pixels by another word": (["data.deep_pixels=auto"], "data.deep_pixels", "bad-deep-pixels"),
    "deep pixels that end first": (["data.deep_pixels=5..-5"], "data.deep_pixels", "bad-deep-pixels"),
    "no data": (["data.train=null"], "data.train", "no-data"),
    "a .beton by dali": (["data.backend=dali", "data.train=x.beton"], "data.train", "beton-without-ffcv"),
    "a folder by ffcv": (["data.backend=ffcv"], "data.train", "not-a-beton"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name):
    refuses_overrides("r50_100ep.yaml", *MISTAKES[name])


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("data.trian", "data.train"),
        ("optimiser.base_lr", "optimizer.base_lr"),
        ("train.base_lr", "optimizer.base_lr"),
        ("optimiser", "optimizer"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_has_a_nearest_one(key, near):
    assert nearest_key(Config, key) == near


# What people paste, and what YAML makes of it; a list that holds itself cannot be printed.
ODD_VALUES = (
    "{a: b}", "[a, b]", "[[1]]", "null", "''", ".nan", "1e400", "&a [*a]", "!!set {a}", "x" * 5000, "9" * 4000,
    f"[{'abc, ' * 500}]", '"\\0\\n\\e[31m"',
)  # fmt: skip


@pytest.fixture(scope="module")
def quickstart():
    return read(CONFIGS / "quickstart.yaml") | {"run": {}, "evaluate": {}, "collapse": {}, "checkpoint": {}}


@pytest.fixture(scope="module")
def odd_values():
    """ODD_VALUES as YAML reads them."""
    read_as = {}
    for number, odd in enumerate(ODD_VALUES):
        apply_override(Config, read_as, f"{number}={odd}")
    return list(read_as.values())


@pytest.mark.parametrize("key", schema_keys(Config))
def test_every_key_answers_odd_values_with_a_short_sentence(key, quickstart, odd_values):
    for odd in odd_values:
        given = copy.deepcopy(quickstart)
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, given)[last] = odd
        try:
            check(Config, given)
        except UserError as error:
            sentence = str(one_sentence(error))
            assert len(sentence) <= 300
            assert sentence.isprintable()


@pytest.mark.parametrize(
    "override",
    [
        "x" * 3000,
        "a." * 2000 + "b=1",
        "train.seed=" + "9" * 5000,
        "run=!!python/object:os.system {}",
        f"run={'[' * 3000}",
        f"{'x' * 3000}=3",
        "=3",
        "a\0b=1",
    ],
)
def test_odd_overrides_are_answered_with_a_short_sentence(override):
    with pytest.raises(UserError) as error:
        load_config("quickstart", [override])
    assert len(str(error.value)) <= 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 3000, "a\0b", "", "/", "configs", "\udcff.yaml"])
def test_odd_config_names_are_answered_with_a_short_sentence(name):
    with refuses("no-such-config") as error:
        load_config(name)
    assert len(str(error.value)) <= 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--config", "r50_100ep.yaml", "data.trian=x"], "unknown-key"),
        (["--config", "r50_100pe.yaml"], "no-such-config"),
        (["--config", "quickstart", "train.epochs=many"], "wrong-type"),
    ],
)
def test_mistakes_exit_with_2_while_torch_cannot_be_imported(arguments, code, tmp_path):
    done = run_python("-c", MASKED, *arguments, f"run.dir={tmp_path}/runs")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert printed_error(done.stderr).code == code
    assert not list(tmp_path.iterdir())


def test_the_mask_does_stop_torch():
    done = run_python("-c", MASKED, "--config", "quickstart", "--dry-run")
    assert "torch is masked" in done.stderr


def test_a_config_is_found_by_path_and_by_name_with_and_without_suffix(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((CONFIGS / "quickstart.yaml").read_text().replace("epochs: 8", "epochs: 7"))
    assert load_config(path).train.epochs == 7
    assert load_config("quickstart") == load_config("quickstart.yaml") == load_config(CONFIGS / "quickstart.yaml")


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    changes = ["optimizer.weight_decay=1e-4", "views.blur=0.25", "collapse.action=off", "checkpoint.every_seconds=.inf"]
    config = load_config("r50_100ep", changes)
    assert (config.optimizer.weight_decay, config.checkpoint.every_seconds) == (1e-4, float("inf"))
    assert config.collapse.action == "off"
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load(config.to_yaml())["views"]["blur_sigma"] == [0.1, 2.0]


def test_a_key_written_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text((CONFIGS / "quickstart.yaml").read_text() + "\ntrain: {epochs: 3}\n")
    with refuses("not-yaml"):
        load_config(path)


def test_what_is_written_beats_the_recipe_and_the_recipe_fills_the_rest():
    (views,) = load_config("r18_cifar10_800ep", ["views.hue=0.2"]).views
    assert (views.hue, views.blur, views.brightness, views.mean) == (0.2, 0.0, 0.4, (0.4914, 0.4822, 0.4465))


def test_a_run_from_before_there_was_a_kind_of_blur_had_a_sampled_gaussian(tmp_path):
    """The config that a run writes names every number of its views, and then named all but this one."""
    config = load_config("r50_100ep", ["views.grayscale=0.25"])
    values = yaml.safe_load(config.to_yaml())
    assert values["views"].pop("blur_kind") == "pil"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    old = load_config(tmp_path / "config.yaml")
    assert differing_keys(old, config) == ["views.blur_kind (gaussian, now pil)"]
    assert load_config(tmp_path / "config.yaml", ["views.blur_kind=pil"]) == config
    unblurred = (load_config(config, ["views.blur=0"]) for config in ("r50_100ep", tmp_path / "config.yaml"))
    assert differing_keys(*unblurred) == ["views.grayscale (0.2, now 0.25)"]


def test_the_run_is_named_by_what_the_overrides_change():
    def name(*overrides):
        return load_config("quickstart", overrides).run.name

    assert name() == "quickstart"
    assert name("train.log_every_steps=7", "run.dir=x", "checkpoint.keep=3", "train.max_steps=9") == "quickstart"
    changed = name("optimizer.base_lr=0.1")
    assert changed.startswith("quickstart-")
    assert changed == name("optimizer.base_lr=1e-1")
    assert changed != name("optimizer.base_lr=0.2")
    assert name("optimizer.base_lr=0.8") == "quickstart"
    assert name("run.name=mine", "optimizer.base_lr=0.1") == "mine"
    assert name("data.train=elsewhere") != "quickstart"


def test_differing_keys_name_what_computes_something_else():
    """Another implementation, too: the last bits differ, and a resumed run is the undisturbed one bit by bit."""
    one = load_config("quickstart")
    other = load_config("quickstart", ["optimizer.base_lr=0.1", "data.workers=3", "optimizer.implementation=apex"])
    assert differing_keys(one, other) == [
        "optimizer.base_lr (0.8, now 0.1)",
        "optimizer.implementation (torch, now apex)",
    ]


def test_other_values_pass_the_checks_of_a_file():
    config = load_config("quickstart")
    changed = config.with_values({"train.batch_size": 8, "views.crop_scale": (0.5, 1.0), "run.name": "mine"})
    assert changed == load_config("quickstart", ["train.batch_size=8", "views.crop_scale=[0.5, 1]", "run.name=mine"])
    assert (config.train.batch_size, config.with_values({})) == (64, config)
    for code, values in {
        "out-of-range": {"train.batch_size": -3},
        "unknown-key": {"train.batchsize": 8},
        "apex-with-fp16": {"optimizer.implementation": "apex", "train.precision": "fp16"},
    }.items():
        with refuses(code):
            config.with_values(values)


def test_a_section_with_nothing_below_it_has_its_defaults(tmp_path):
    values = read(CONFIGS / "quickstart.yaml") | {"evaluate": None, "run": None}
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "quickstart.yaml").evaluate == EvaluateConfig()


def test_operational_keys_exist():
    assert set(OPERATIONAL) <= set(schema_keys(Config))


def test_the_rate_is_that_of_256_images_scaled():
    assert load_config("r50_100ep").learning_rate == pytest.approx(0.1)
    assert load_config("r18_cifar10_800ep").learning_rate == pytest.approx(0.06)
    assert load_config("r50_100ep", ["train.batch_size=64"]).learning_rate == pytest.approx(0.0125)


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(tmp_path, monkeypatch):
    """A shell expands it at the beginning of a word only, and not in key=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    keys = ("data.train", "data.val", "data.manifest", "run.dir")
    config = load_config("~/my.yaml", [f"{key}=~/x y" for key in keys])
    assert [flat(config.model_dump())[key] for key in keys] == [f"{tmp_path}/x y"] * 4
    assert load_config("quickstart", ["data.train=a~/b"]).data.train == "a~/b"


@pytest.mark.parametrize(
    ("overrides", "seed"),
    [
        ([], 0),
        (["data.val=null"], 0),
        (["data.train=./data/demo/train"], 0),
        (["data.train=mine"], None),
        (["data.train=mine/train", "data.val=mine/val"], None),
        (["data={train: mine}"], None),
        (["data.train=mine/train", "data.demo_seed=3"], 3),
    ],
)
def test_demo_images_are_for_the_folder_of_the_file(overrides, seed):
    assert load_config("quickstart", overrides).data.demo_seed == seed


def test_heads_in_the_section_model_are_read_as_those_of_the_method(tmp_path):
    now = load_config("r50_100ep")
    values = now.model_dump(mode="json")
    values["model"] |= {name: values["method"].pop(name) for name in ("projector", "predictor")}
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "before.yaml") == now
    changed = load_config("r50_100ep", ["model.projector.hidden=64"])
    assert changed.method.projector.model_dump() == {"layers": 3, "hidden": 64, "out": 2048, "norm": "all"}
    # The name that this override gave in 0.1.0.
    assert changed.run.name == "r50_100ep-74dbed5b"


def test_groups_of_views_differ_by_their_numbers():
    swav = load_config("r50_100ep_swav_b4096")
    other = load_config("r50_100ep_swav_b4096", ["views.1.count=4", "views.0.blur=0.1"])
    assert differing_keys(swav, other) == ["views.0.blur (0.5, now 0.1)", "views.1.count (6, now 4)"]
    one = load_config("r50_100ep")
    two = one.with_values({"views": [one.views[0].model_dump(), swav.views[1].model_dump()]})
    assert {key.split(".")[1] for key in differences(one, two)} == {"1"}
