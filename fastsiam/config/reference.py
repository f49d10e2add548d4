"""Reference of all keys of a config, read from its schema: documentation, range and default."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    found: dict[str, dict[str, Key]] = {}
    for key, owner in _walk(schema, schema["$defs"], ""):
        found.setdefault(key.name, {})[owner] = key
    of_all = max(map(len, found.values()))
    return {name: _merged(owners, of_all) for name, owners in found.items()}


def find(name: str) -> list[Key]:
    """Returns the key of this name, or all keys of a section; raises `UserError` with the nearest key otherwise."""
    found = [key for key in keys().values() if key.name == name or key.name.startswith(f"{name}.")]
    if not found:
        raise UserError(f"{name} is not a key{did_you_mean(Config, name)}", "unknown-key")
    return found


def _merged(owners: dict[str, Key], of_all: int) -> Key:
    """One key of what the sections of a union, by their names, say of it; a key of no union has the owner ""."""
    keys, names = list(owners.values()), ", ".join(owners)
    if len(keys) == 1:
        return replace(keys[0], documentation=f"{names}: {keys[0].documentation}") if names else keys[0]
    texts, defaults = _by_text(owners, "documentation"), _by_text(owners, "default")
    return Key(
        keys[0].name,
        " ".join(text if len(of) == of_all else f"{', '.join(of)}: {text}" for text, of in texts.items()),
        " or ".join(dict.fromkeys(key.range for key in keys)),
        _listed([text if len(defaults) == 1 else f"{text} ({', '.join(of)})" for text, of in defaults.items()]),
    )


def _by_text(owners, field):
    """Owners of each text of one field of a key, in order."""
    texts: dict[str, list[str]] = {}
    for owner, key in owners.items():
        texts.setdefault(getattr(key, field), []).append(owner)
    return texts


def _walk(schema: dict, definitions: dict, prefix: str, owner: str = "") -> Iterator[tuple[Key, str]]:
    for name, field in schema["properties"].items():
        sections = list(_sections(field, definitions))
        for section in sections:
            of_union = section["properties"].get("name", {}).get("const", "") if "discriminator" in field else owner
            yield from _walk(section, definitions, f"{prefix}{name}.", of_union)
        if not sections:
            documentation = " ".join(field.get("description", "").split())
            yield Key(prefix + name, documentation, _range(field), _default(prefix + name, field, schema)), owner


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
    if name.startswith(("method.projector.", "method.predictor.")):
        return "by method.name"
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
