"""Weights that a new run begins with: read, matched and checked before anything is written (model.weights)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastsiam.config import Config
from fastsiam.config.encoder_names import OWN, TIMM, TORCHVISION_RESNETS
from fastsiam.config.yaml_file import shown
from fastsiam.errors import UserError
from fastsiam.models.encoder import build_on_meta, check_sizes
from fastsiam.models.weights import Match, find, flatten, look_alike, not_finite
from fastsiam.run.encoder_file import encoder_path, read_contents
from fastsiam.run.hub_weights import OF_TORCHVISION, of_timm, torchvision_file
from fastsiam.run.weight_files import hub_file, sha256_of, unchanged
from fastsiam.runtime.distributed import World
from fastsiam.runtime.rank_check import check_alike

_NAMED = 3


@dataclass
class Source:
    """What model.weights names."""

    tensors: Mapping[str, torch.Tensor]
    sha256: str
    arch: object = None
    """Architecture by the file's own words."""
    description: dict | None = None
    """`describe_encoder` of the run that wrote it."""


class StartWeights:
    """Weights of an encoder that wait to be loaded, and what is said of them."""

    def __init__(self, config: Config, source: Source, match: Match):
        self._match = match
        self.record = {"source": config.model.weights, "sha256": source.sha256, "matched": match.matched}
        """For encoder.safetensors and environment.json; `earlier`: the same of the run that the weights come from."""
        if earlier := (source.description or {}).get("weights"):
            self.record["earlier"] = earlier

    def load_into(self, encoder: nn.Module) -> None:
        """Copy the weights; what they do not hold stays as it is. They are given up then."""
        encoder.load_state_dict(self._match.state, strict=False)
        self._match = self._match._replace(state={})

    def check_same(self, record: dict | None) -> None:
        """Raise `UserError` where a run has recorded another file than this one."""
        then = (record or {}).get("sha256")
        if then != self.record["sha256"]:
            raise UserError(
                f"model.weights: {self.record['source']} is another file (sha256 {self.record['sha256'][:12]}, then "
                f"{str(then)[:12]}); put the first one back",
                "other-weights",
            )

    def lines(self) -> list[str]:
        """What was found in the file, for the first lines of a run."""
        match = self._match
        where = f"under {match.prefix}*" if match.prefix else "by their names"
        parts = [
            f"{self.record['source']} (sha256 {self.record['sha256'][:12]}): {match.matched} of {match.needed} tensors "
            f"matched {where}",
            _counted("missing", match.missing),
            _shapes(match),
            _counted("dropped", match.dropped),
        ]
        if match.elsewhere:
            parts.append(f"{match.elsewhere} elsewhere")
        lines = [f"weights   {', '.join(parts)}"]
        if match.rivals:
            lines.append(f"weights   {match.prefix or 'the names without a prefix'} taken, as much fits under "
                         f"{', '.join(f'{rival}*' for rival in match.rivals)}")  # fmt: skip
        return lines


def _counted(word, names):
    if not names:
        return f"{word} 0"
    return f"{word} {len(names)} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"


def _shapes(match):
    named = [f"{name} {list(theirs)}, here {list(ours)}" for name, (theirs, ours) in match.mismatched.items()]
    return f"other shapes {len(named)}" + (f" ({'; '.join(named)})" if named else "")


def check_encoder(config: Config) -> None:
    """Raise `UserError` where the encoder cannot be built, or does not take views of all sizes of the run."""
    model = config.model
    if model.encoder in TORCHVISION_RESNETS or model.encoder.startswith(OWN):
        # Convolutions and a mean take every size.
        return
    encoder = build_on_meta(model.encoder, model.stem, model.width, model.zero_init_residual)
    sizes = {size for stage in config.view_stages for size in stage}
    check_sizes(encoder, model.encoder, sorted(sizes, reverse=True))


def start_weights(config: Config, world: World) -> StartWeights | None:
    """The weights of model.weights, the same on all ranks, which must call together; None for random ones.

    Raises `UserError` where they cannot be read, do not fit the encoder, or differ between ranks.
    """
    if config.model.weights is None:
        return None
    with world.together():
        # One rank of a machine downloads.
        with world.leader_first():
            source = read_source(config.model.weights, config.model.encoder)
        weights = fitted(config, source)
    check_alike(world, {"model.weights: sha256": source.sha256})
    return weights


def read_source(name: str, encoder: str) -> Source:
    """Read a file, a run or published weights of `encoder`; see `model.weights`."""
    if name.startswith(TIMM):
        tensors, sha256 = of_timm(name.removeprefix(TIMM))
        return Source(tensors, sha256)
    path = Path(name)
    try:
        if name.startswith(OF_TORCHVISION):
            path = torchvision_file(name.removeprefix(OF_TORCHVISION), encoder)
        elif path.is_dir():
            path = hub_file(path) or encoder_path(path)
        if not path.exists():
            raise UserError(
                f"model.weights: there is no {path}; give a file, the folder of a run, {OF_TORCHVISION}DEFAULT or "
                f"{TIMM}NAME",
                "no-such-file",
            )
        with unchanged(path):
            return _of_file(path)
    except OSError as error:
        raise UserError(f"model.weights: {path} cannot be read ({error.strerror or error})", "unreadable") from error
    except UserError as error:
        raise error if error.key else UserError(f"model.weights: {error}", error.code) from error


def _of_file(path):
    contents = read_contents(path)
    if isinstance(contents, tuple):
        tensors, description = contents
        return Source(tensors, sha256_of(path), description=description)
    arch = contents.get("arch") if isinstance(contents, dict) else None
    return Source(flatten(contents), sha256_of(path), arch)


def fitted(config: Config, source: Source) -> StartWeights:
    """Match a source with the encoder of a config; raises `UserError` where it does not fit or holds a NaN."""
    model = config.model
    encoder = build_on_meta(model.encoder, model.stem, model.width)
    match = find(source.tensors, encoder)
    if bad := not_finite(match.state):
        raise UserError(
            f"model.weights: {model.weights} holds NaN or infinite values in {_counted('tensors', bad)}; take a "
            "checkpoint from before they came",
            "weights-not-finite",
        )
    fits = match.matched == match.needed and not match.deeper
    if not fits and not (model.weights_partial and match.matched):
        raise _does_not_fit(config, source, match)
    return StartWeights(config, source, match)


def _does_not_fit(config, source, match):
    model = config.model
    cure = "set the model.encoder that it was made with"
    alike = _architecture(source)
    if alike is not None and alike != {"encoder": model.encoder, "stem": model.stem, "width": model.width}:
        values = {key: value for key, value in alike.items() if value != getattr(model, key)}
        cure = f"its tensors are those of {alike['encoder']}: set " + " ".join(
            f"model.{key}={'null' if value is None else value}" for key, value in values.items()
        )
    if not match.matched and not match.mismatched:
        keys = ", ".join(shown(key) for key in list(source.tensors)[:_NAMED])
        holds = f"it holds {keys}, ..." if keys else "it holds no tensors by name"
        text = f"model.weights: {model.weights} has no tensor of {model.encoder} ({holds}); {cure}"
        return UserError(text, "weights-of-another-model")
    reasons = [_counted("missing", match.missing)] if match.missing else []
    if match.deeper:
        reasons.append(_counted("more layers", match.deeper))
    if match.mismatched:
        name, (theirs, ours) = next(iter(match.mismatched.items()))
        reasons.append(f"of another shape {len(match.mismatched)}: {name} {list(theirs)}, here {list(ours)}")
    if match.matched:
        cure += ", or model.weights_partial=true to begin with what fits"
    return UserError(
        f"model.weights: {model.weights} has {match.matched} of the {match.needed} tensors of {model.encoder} "
        f"({'; '.join(reasons)}); {cure}",
        "weights-do-not-fit",
    )


def _architecture(source):
    if source.description:
        return {key: source.description[key] for key in ("encoder", "stem", "width")}
    found = look_alike(source.tensors, source.arch)
    return found and {"encoder": found[0], "stem": found[1], "width": None}
