"""Reading a config file and overrides, and saying in one sentence what is wrong with them."""

import difflib
import json
import os
import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from fastsiam.errors import UserError


def expand_home(path: Path | str) -> Path:
    """A path with a leading `~` or `~user` as the home folder, which a shell leaves alone in `key=~/x`."""
    # pathlib's own raises where there is no home folder; there the name stays as it is.
    return Path(os.path.expanduser(path))


# Of a sentence, and of a value in it.
_LONGEST, _LONGEST_VALUE = 300, 60


def shown(value: object) -> str:
    """A value as a sentence quotes it: in one line, without control characters, shortened in the middle."""
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
    """`text` in at most `longest` printable characters; what is cut out of its middle becomes three dots."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def one_sentence(error: UserError) -> UserError:
    """The same error, short enough to read on a screen whatever the user has typed."""
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
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections; start from one of the files in configs/")
    return values


def apply_override(model: type[BaseModel], values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{shown(override)} is not an override; write section.key=value, for example train.epochs=10")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {shown(text)} is not readable as YAML") from error
    *sections, last = key.split(".")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"{key}: {section} is a value, not a section{_did_you_mean(model, key)}")
    node[last] = value


def check(model: type[BaseModel], values: dict) -> BaseModel:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(_sentence(model, problems[0]) + more) from None


def _sentence(model, problem: dict) -> str:
    known = schema_keys(model)
    parts = [str(part) for part in problem["loc"]]
    while parts and ".".join(parts) not in known and problem["type"] != "extra_forbidden":
        parts.pop()
    key, value = ".".join(parts), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a key{_did_you_mean(model, key)}"
    if problem["type"] == "missing":
        return f"{'.'.join(map(str, problem['loc']))} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "model_type":
        return f"{key}: {shown(value)} is a value, and {key} is a section; write {key}.KEY=VALUE"
    message = problem["msg"].replace("Input should be", "should be")
    return f"{key}: {shown(value)} {message}"


def _did_you_mean(model, key: str) -> str:
    known = list(schema_keys(model))
    same_level = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    near = (
        difflib.get_close_matches(key, same_level, 1, 0.8)
        or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        or difflib.get_close_matches(key, known, 1, 0.5)
    )
    if near:
        return f"; did you mean {near[0]}?"
    return f"; its section has {', '.join(n.rpartition('.')[2] for n in same_level)}" if same_level else ""


def schema_keys(model: type[BaseModel], prefix: str = "") -> dict[str, None]:
    keys: dict[str, None] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = None
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.update(schema_keys(field.annotation, f"{prefix}{name}."))
    return keys


def flat(values: dict, prefix: str = "") -> dict:
    """Nested sections as one dict with dotted keys."""
    found = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found
