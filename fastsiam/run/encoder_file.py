"""Encoders on the disk: encoder.safetensors of a run that has ended, and the one in a checkpoint of any other run."""

import contextlib
import hashlib
import json
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

import fastsiam
from fastsiam.config import Config, load_config
from fastsiam.config.yaml_file import shortened
from fastsiam.errors import MissingLibraryError, UserError
from fastsiam.models.encoder import build_encoder, build_on_meta
from fastsiam.models.weights import find, flatten, look_alike
from fastsiam.run import checkpoint
from fastsiam.run.folder import read_status
from fastsiam.run.weight_files import read_file, sha256_of
from fastsiam.runtime.files import replace_file

READS = (
    "load_encoder reads the folder of a run (runs/NAME), its encoder.safetensors or its checkpoint.pt, and weights of "
    "torchvision's networks"
)
# Between two tries to read a run that is writing, in seconds.
_PAUSE, _TRIES = 0.05, 20
_BUILDS = ("encoder", "stem", "width")


def describe_encoder(
    config: Config,
    step: int | None,
    commit: str | None,
    images_seen: int | None = None,
    knn: float | None = None,
    knn_step: int | None = None,
    weights: dict | None = None,
) -> dict:
    """Description in the file of an encoder: how to build it, how to feed it, and where it comes from.

    `mean` and `std` [3] normalise RGB in [0, 1]; `size` is the side in pixels of the views that it was trained on, and
    of evaluation crops: the centred square of `crop_ratio` times the short side, resized by `interpolation` with
    antialiasing, as Pillow does it and every backend. `step` counts its training steps, `images_seen` the images of
    their batches; `commit` is that of the code. `knn` is kNN top-1 in percent as last measured, after step `knn_step`,
    with `knn_k` neighbours at `knn_temperature`; all four are None where it never was. `average` is `ema` where the
    weights are the moving average over its steps, `none` where they are those of the last. `config` is the SHA-256 of
    the run's config.yaml. `weights`: what training began from, with the SHA-256 of that file, and below `earlier` what
    that began from; missing for random weights.
    """
    spec = config.view_groups[0].spec
    return {
        **{key: getattr(config.model, key) for key in _BUILDS},
        "mean": list(spec.mean),
        "std": list(spec.std),
        "size": spec.size,
        "crop_ratio": config.evaluate.crop_ratio,
        "interpolation": "bilinear",
        "recipe": config.views[0].recipe,
        "method": config.method.name,
        "step": step,
        "images_seen": images_seen,
        "average": config.evaluate.average,
        "knn": knn,
        "knn_step": knn_step,
        "knn_k": config.evaluate.knn_k if knn is not None else None,
        "knn_temperature": config.evaluate.knn_temperature if knn is not None else None,
        "config": _sha256(config.to_yaml().encode()),
        "commit": commit,
        "fastsiam": fastsiam.__version__,
        **({"weights": weights} if weights else {}),
    }


def save_encoder(encoder: nn.Module, description: dict, path: Path) -> None:
    """Write the encoder's weights as safetensors, with `describe_encoder` as JSON under `fastsiam` in the metadata.

    Raises `UserError` where the disk refuses; a file that was there stays.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    try:
        replace_file(path, save(state, {"fastsiam": json.dumps(description)}))
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})", "encoder-unwritten") from error


def load_encoder(path: str | Path) -> nn.Module:
    """The encoder of a run, in evaluation mode on the CPU.

    `path`: the folder of a run, finished, stopped or still running; an `encoder.safetensors`; or a `checkpoint.pt`.
    It maps images [B, 3, S, S], RGB in [0, 1] from which its `mean` is subtracted and which are divided by its `std`,
    to features [B, D]. `mean` and `std` are tuples of three floats, None in files of version 0.1.0 that lie outside
    their run's folder. `description` is the dict of `describe_encoder`, as far as the file holds it.

    Files of other programs are read where they hold all weights of one of torchvision's networks, under any prefix (a
    checkpoint of SimSiam's authors); `mean` and `std` are None then. Raises `UserError` (a `ValueError`) for any other
    path. Runs no code of a file.
    """
    path = Path(path).expanduser()
    try:
        state, description = _read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})", "unreadable") from error
    try:
        encoder = build_encoder(*(description[key] for key in _BUILDS), zero_init_residual=False)
        encoder.load_state_dict(state)
    except MissingLibraryError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = shortened(str(error), 150)
        raise UserError(f"{path} does not hold the encoder that it describes ({reason})", "not-an-encoder") from error
    for key in ("mean", "std"):
        values = description.get(key)
        setattr(encoder, key, None if values is None else tuple(map(float, values)))
    encoder.description = description
    return encoder.eval()


def _read(path):
    """Weights and description; tried again for a moment where a run is renaming its checkpoints just now."""
    for _ in range(_TRIES):
        with contextlib.suppress(UserError, FileNotFoundError):
            return _of_run(path) if path.is_dir() else _of_file(path)
        if read_status(path if path.is_dir() else path.parent).get("status") != "running":
            break
        time.sleep(_PAUSE)
    return _of_run(path) if path.is_dir() else _of_file(path)


def _of_run(folder):
    path = encoder_path(folder)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    return _of_saved(_newest_checkpoint(folder), folder / "checkpoint.pt")


def encoder_path(folder: Path) -> Path:
    """The file of a run that holds its newest encoder: encoder.safetensors once it has ended, otherwise a checkpoint.

    Raises `UserError` for a folder without one.
    """
    file, has_ended = folder / "encoder.safetensors", read_status(folder).get("status") in ("done", None)
    saved = [] if file.is_file() and has_ended else checkpoint.existing(folder)
    if saved:
        return saved[0]
    if file.is_file():
        return file
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} holds no encoder and no checkpoint yet; the run writes one when it is stopped",
            "no-checkpoint-yet",
        )
    runs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    if runs:
        raise UserError(
            f"{folder} is not a run but holds {len(runs)}; give one of them, for example {folder / runs[0]}",
            "folder-of-runs",
        )
    raise UserError(f"there is no run in {folder} (no encoder.safetensors, no checkpoint.pt); {READS}", "no-run")


def _newest_checkpoint(folder):
    damaged = []
    saved = checkpoint.load_newest(folder, damaged.append)
    for sentence in damaged:
        warnings.warn(sentence, stacklevel=5)
    return saved


def _of_file(path):
    if not path.exists():
        raise UserError(f"there is no {path}; {READS}", "no-such-file")
    contents = read_contents(path)
    return contents if isinstance(contents, tuple) else _of_another_program(contents, path)


def read_contents(path: Path) -> tuple[dict, dict] | object:
    """(weights, description) of an encoder of fastsiam; what `read_file` returns for files of other programs."""
    with open(path, "rb") as file:
        start = file.read(9)
    # Eight bytes of a length, then JSON.
    if start[8:] == b"{" and "fastsiam" in _metadata(path):
        return _of_safetensors(path)
    contents = read_file(path)
    return _of_saved(contents, path) if _is_ours(contents) else contents


def _is_ours(saved):
    return isinstance(saved, dict) and {"layout", "method", "identity"} <= saved.keys()


def _metadata(path):
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again from its run's folder", "damaged-file") from error


def _of_another_program(contents, path):
    """Weights and description of a network of torchvision."""
    tensors = flatten(contents)
    alike = look_alike(tensors, contents.get("arch") if isinstance(contents, dict) else None)
    if alike is None:
        raise UserError(
            f"{path} is a file of another program ({_contents(contents)}) and not the weights of one of torchvision's "
            "networks; load it with that program",
            "other-program",
        )
    encoder = build_on_meta(*alike, None)
    found = find(tensors, encoder)
    weights = {"source": str(path), "sha256": sha256_of(path), "matched": found.matched}
    # The numbers of batches that batch norm has seen are of no use in evaluation mode, and may be missing.
    counters = encoder.state_dict().keys() - found.state.keys()
    state = found.state | {name: torch.tensor(0) for name in counters}
    return state, dict(zip(_BUILDS, (*alike, None), strict=True)) | {"weights": weights}


def _of_safetensors(path):
    metadata, state = _metadata(path), load_file(path)
    if "fastsiam" not in metadata:
        raise UserError(
            f"{path} was not written by fastsiam: its metadata do not say what encoder it holds; load it with the "
            "library that wrote it",
            "other-program",
        )
    try:
        description = dict(json.loads(metadata["fastsiam"]))
    except (ValueError, TypeError) as error:
        text = f"{path} has damaged metadata ({error}); copy it again from its run's folder"
        raise UserError(text, "damaged-file") from error
    if "finetuned" in description:
        # A classifier of fastsiam evaluate finetune.
        state = _encoder_in(state)
    return state, _completed(description, path)


def _encoder_in(state):
    return {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}


def _of_saved(saved, path):
    """The encoder in what a checkpoint holds."""
    if not _is_ours(saved):
        raise UserError(f"{path} is a file of another program ({_contents(saved)}); {READS}", "other-program")
    if saved["layout"] != checkpoint.LAYOUT:
        raise UserError(f"{path} is of another version of fastsiam; load it with that version", "other-version")
    counted = {key: saved["state"].get(key) for key in ("step", "images_seen")}
    description = _completed(counted | (saved.get("encoder") or {}), path)
    if "encoder" not in description:
        raise UserError(
            f"{path} does not describe its encoder; put the config.yaml of its run beside it", "no-description"
        )
    return saved.get("average") or _encoder_in(saved["method"]), description


def _contents(saved):
    if not isinstance(saved, dict):
        return f"it holds a {type(saved).__name__}"
    names = ", ".join(str(key)[:30] for key in list(saved)[:3])
    return f"it holds {names}, ..."


def _completed(description, path):
    """A description of an earlier version, with what the config.yaml of its run says where that lies beside the file.

    Nothing there tells the step, kNN and commit of the weights, or the version that wrote them.
    """
    if "config" in description or (config := _config_beside(path)) is None:
        return description
    found = describe_encoder(config, None, None)
    if any(description.get(key, found[key]) != found[key] for key in _BUILDS):
        return description
    del found["fastsiam"]
    # As the run wrote it, not as this version would.
    found["config"] = _sha256(path.with_name("config.yaml").read_bytes())
    return found | description


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _config_beside(path):
    try:
        return load_config(path.with_name("config.yaml")) if path.with_name("config.yaml").is_file() else None
    except UserError:
        return None
