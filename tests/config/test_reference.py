"""`fastsiam config`: the reference of the keys, by the schema."""

from typing import get_args

import pytest

from fastsiam.__main__ import main
from fastsiam.config import Config, load_config
from fastsiam.config.reference import find, keys
from fastsiam.config.yaml_file import flat
from tests.support.refusals import refused


def test_it_has_the_keys_of_a_config_each_with_documentation():
    found = keys()
    method = {name for name in found if name.startswith("method.")}
    assert set(found) - method == set(flat(load_config("quickstart").model_dump(exclude={"method"})))
    sections = [part.model_json_schema()["properties"] for part in get_args(Config.model_fields["method"].annotation)]
    assert {name.split(".")[1] for name in method} == {key for section in sections for key in section}
    assert [name for name, key in found.items() if not key.documentation.endswith((".", ")"))] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.batch_size", ("integer > 1", "required")),
        ("train.compile", ("auto, on or off", "auto")),
        ("optimizer.warmup", ("number in [0, 1)", "0.0")),
        ("optimizer.implementation", ("torch or apex", "torch")),
        ("data.demo_seed", ("integer >= 0 or null", "null")),
        ("model.width", ("integer >= 8, a multiple of 8 or null", "null")),
        ("method.projector.out", ("integer > 0", "by method.name")),
        ("method.temperature", ("number > 0", "0.1 (simclr, swav) or 0.2 (moco)")),
        ("method.prototypes", ("integer >= 2", "3000")),
        ("views.crop_scale", ("[number, number]", "by views.recipe")),
        ("train.channels_last", ("true or false", "true")),
    ],
)
def test_range_and_default_are_those_of_the_schema(name, expected):
    (key,) = find(name)
    assert (key.range, key.default) == expected


def test_a_section_prints_its_keys_and_nothing_prints_all(capsys):
    assert main(["config", "checkpoint"]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert names == ["checkpoint.every_seconds", "checkpoint.keep"]
    assert main(["config"]) == 0
    said = capsys.readouterr().out
    assert [name for name in keys() if f"\n{name} " not in f"\n{said}"] == []
    assert max(map(len, said.splitlines())) <= 120


def test_an_unknown_key_is_refused_with_the_nearest():
    error = refused("config", "train.seeed")
    assert error.code == "unknown-key"
    assert str(error).endswith("train.seed?")
