"""Reference of all keys of a config, read from its schema: documentation, range and default."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from fastsiam.config.schema import Config
from fastsiam.config.views import RECIPES
from fastsiam.config.yaml_file import did_you_mean
from fastsiam.errors import UserError


@dataclass(frozen=True)
class Key:
    """One key of a config, with its texts for people."""

    name: str
    """Dotted, `train.batch_size`."""
    documentation: str
    range: str
    """Values that the key takes, `integer > 1`."""
    default: str
    """Default value as in YAML, or `required`."""


def keys() -> dict[str, Key]:
    """Returns all keys by name, in the order of the schema; sections are not among them."""
    schema = Config.model_json_schema()
    found: dict[str, Key] = {}
    for key in _walk(schema, schema["$defs"], ""):
        found.setdefault(key.name, key)
    return found


def find(name: str) -> list[Key]:
    """Returns the key of this name, or all keys of a section; raises `UserError` with the nearest key otherwise."""
    found = [key for key in keys().values() if key.name == name or key.name.startswith(f"{name}.")]
    if not found:
        raise UserError(f"{name} is not a key{did_you_mean(Config, name)}", "unknown-key")
    return found


def _walk(schema: dict, definitions: dict, prefix: str) -> Iterator[Key]:
    for name, field in schema["properties"].items():
        sections = list(_sections(field, definitions))
        for section in sections:
            yield from _walk(section, definitions, f"{prefix}{name}.")
        if not sections:
            documentation = " ".join(field.get("description", "").split())
            yield Key(prefix + name, documentation, _range(field), _default(prefix + name, field, schema))


def _sections(field: dict, definitions: dict) -> Iterator[dict]:
    """Yields the sections below a field: the one that it is, each of a union, or those of a list."""
    if "$ref" in field:
        section = definitions[field["$ref"].rpartition("/")[2]]
        yield from [section] if "properties" in section else _sections(section, definitions)
    items = [field["items"]] if "items" in field else []
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ()), *items):
        yield from _sections(part, definitions)


def _default(name, field, schema):
    number = name.removeprefix("views.")
    if number != name and all(number in recipe.numbers() for recipe in RECIPES.values()):
        return "by views.recipe"
    is_required = name.rpartition(".")[2] in schema.get("required", ())
    return "required" if is_required else json.dumps(field.get("default")).strip('"')


def _range(field: dict) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(_range, field["anyOf"])))
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return _listed([str(choice) for choice in field["enum"]])
    if "prefixItems" in field:
        return f"[{', '.join(map(_range, field['prefixItems']))}]"
    kind = {"string": "text", "boolean": "true or false"}.get(field["type"], field["type"])
    step = f", a multiple of {field['multipleOf']}" if "multipleOf" in field else ""
    return kind + _bounds(field) + step


def _bounds(field):
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    lower = None if low is None and above is None else f"[{low:g}" if above is None else f"({above:g}"
    upper = None if high is None and below is None else f"{high:g}]" if below is None else f"{below:g})"
    if lower and upper:
        return f" in {lower}, {upper}"
    if lower:
        return f" {'>=' if above is None else '>'} {lower[1:]}"
    return f" {'<=' if below is None else '<'} {upper[:-1]}" if upper else ""


def _listed(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
