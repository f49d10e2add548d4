"""Reads config files and overrides, and explains in one sentence what is wrong with them."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastsiam.errors import UserError


def expand_home(path: Path | str) -> Path:
    """Returns a path with a leading `~` or `~user` expanded, which a shell does not do in `key=~/x`."""
    # pathlib's own raises where there is no home folder; there the name stays as it is.
    return Path(os.path.expanduser(path))


# Characters of a sentence, and of a value in it.
_LONGEST, _LONGEST_VALUE = 300, 60


def shown(value: object) -> str:
    """Returns a value as a sentence quotes it: on one line, without control characters, shortened in the middle."""
    if value is None:
        return "null"
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except ValueError:
        # A list or mapping that holds itself, by YAML's anchors.
        text = str(value)
    text = shortened(text, _LONGEST_VALUE)
    return f"'{text}'" if isinstance(value, str) else text


def shortened(text: str, longest: int) -> str:
    """Returns `text` in at most `longest` printable characters, with three dots in place of its middle."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def one_sentence(error: UserError) -> UserError:
    """Returns the same error, short enough to read on a screen whatever the user has typed."""
    return UserError(shortened(str(error), _LONGEST), error.code)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number, `off` is a word, and a key written twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is written twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)


def read(path: Path) -> dict:
    """Returns the sections of a config file, not checked yet; raises `UserError` for what is not YAML."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "unreadable-config") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as YAML: {' '.join(str(error).split())}", "not-yaml") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections; start from one of the files in configs/", "no-sections")
    return values


def apply_override(model: type[BaseModel], values: dict, override: str) -> str:
    """Sets the key of `section.key=value`, the value in YAML, in the nested `values`; returns the key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"{shown(override)} is not an override; write section.key=value, for example train.epochs=10",
            "not-an-override",
        )
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {shown(text)} is not readable as YAML", "not-yaml") from error
    set_value(model, values, key, value)
    return key


def set_value(model: type[BaseModel], values: dict, key: str, value: object) -> None:
    """Sets a dotted key in the nested `values`; missing sections are made, and a number picks from a list of them."""
    *sections, last = key.split(".")
    node = values
    for section in sections:
        if isinstance(node, list):
            node = node[int(section)] if section.isdecimal() and int(section) < len(node) else None
        else:
            node = node.setdefault(section, {})
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: {section} is a value, not a section{did_you_mean(model, key)}", "not-a-section")
    if isinstance(node, list):
        place = ".".join(sections)
        raise UserError(f"{key}: {place} is a list; write {place}.0.{last} for its first entry", "not-a-section")
    node[last] = value


def check(model: type[BaseModel], values: dict) -> BaseModel:
    """Returns the model of `values`; raises `UserError` for the first problem, with the number of the others."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = _explained(model, problems[0])
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{first}{more}", first.code) from None


_CODES = {
    "literal_error": "unknown-choice", "finite_number": "out-of-range", "multiple_of": "out-of-range",
    "greater_than": "out-of-range", "greater_than_equal": "out-of-range",
    "less_than": "out-of-range", "less_than_equal": "out-of-range",
}  # fmt: skip


def _explained(model, problem: dict) -> UserError:
    known = schema_keys(model)
    parts = place = _parts(model, problem["loc"])
    while parts and ".".join(parts) not in known and problem["type"] != "extra_forbidden":
        parts = parts[:-1]
    key, value, kind = ".".join(parts), problem["input"], problem["type"]
    if kind == "extra_forbidden":
        return _unknown(model, key, problem["loc"])
    if kind == "missing":
        return UserError(f"{'.'.join(place)} is missing", "missing-key")
    if kind == "value_error":
        error = problem["ctx"]["error"]
        return UserError(str(error), getattr(error, "code", None))
    if kind in ("model_type", "model_attributes_type"):
        return UserError(
            f"{key}: {shown(value)} is a value, and {key} is a section; write {key}.KEY=VALUE", "not-a-section"
        )
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_section(model.model_fields[key], f"{key}.{problem['ctx']['discriminator'][1:-1]}", value)
    message = problem["msg"].replace("Input should be", "should be")
    return UserError(f"{key}: {shown(value)} {message}", _CODES.get(kind, "wrong-type"))


def _parts(model, place: tuple) -> list[str]:
    """Names on the way to a problem: without numbers in a list, which has the keys of one entry, and without the name
    by which one of several sections was chosen.
    """
    parts = [part for part in place if isinstance(part, str)]
    field = model.model_fields.get(parts[0]) if parts else None
    return [parts[0], *parts[2:]] if field is not None and field.discriminator else parts


def _unknown(model, key, place):
    if key not in schema_keys(model):
        return UserError(f"{key} is not a key{did_you_mean(model, key)}", "unknown-key")
    section, chosen, *_ = place
    field, below = model.model_fields[section], key.removeprefix(f"{section}.")
    owners = [name for name, part in _sections(field).items() if below in schema_keys(part)]
    text = f"{key}: {chosen} has no such key, but {', '.join(owners)}; set {section}.{field.discriminator}={owners[0]}"
    return UserError(text + ", or leave it out", "key-of-another-choice")


def _unknown_section(field, key, value):
    names = list(_sections(field))
    given = value.get(field.discriminator)
    if given is None:
        return UserError(f"{key} is missing; it is one of {', '.join(names)}", "missing-key")
    near = difflib.get_close_matches(str(given), names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{key}: {shown(given)} is not one of {', '.join(names)}{hint}", "unknown-choice")


def _sections(field) -> dict[str, type[BaseModel]]:
    """The sections of a union by the names that choose them."""
    parts = get_args(field.annotation)
    return {get_args(part.model_fields[field.discriminator].annotation)[0]: part for part in parts}


def nearest_key(model: type[BaseModel], key: str) -> str | None:
    """Returns the key of a model that is probably meant by one that does not exist."""
    known = list(schema_keys(model))
    near = (
        difflib.get_close_matches(key, _beside(known, key), 1, 0.8)
        or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        or difflib.get_close_matches(key, known, 1, 0.5)
    )
    return near[0] if near else None


def did_you_mean(model: type[BaseModel], key: str) -> str:
    """Ends a sentence on a key that does not exist: names the nearest one, or those of its section."""
    if near := nearest_key(model, key):
        return f"; did you mean {near}?"
    beside = _beside(schema_keys(model), key)
    return f"; its section has {', '.join(name.rpartition('.')[2] for name in beside)}" if beside else ""


def _beside(known, key):
    return [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]


def schema_keys(model: type[BaseModel], prefix: str = "") -> dict[str, None]:
    """Dotted names of all sections and keys of a model, in order."""
    keys: dict[str, None] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = None
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys.update(schema_keys(part, f"{prefix}{name}."))
    return keys


def flat(values: dict, prefix: str = "") -> dict:
    """Returns nested sections as one dict with dotted keys."""
    found = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found
