"""Weights that torchvision and timm publish, by name: downloaded once into the caches of torch and of Hugging Face."""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision

from fastsiam.config.encoder_names import TIMM, TORCHVISION
from fastsiam.config.yaml_file import shortened, shown
from fastsiam.errors import UserError
from fastsiam.models.encoder import import_timm
from fastsiam.run.weight_files import sha256_of, sha256_of_tensors

OF_TORCHVISION = "torchvision:"
# In the name of a file: the first digits of its SHA-256, which torch.hub compares.
_HASH = re.compile(r"-([a-f0-9]{6,})\.")


def torchvision_file(name: str, encoder: str) -> Path:
    """The file of `ResNet50_Weights.IMAGENET1K_V2`, `IMAGENET1K_V2` or `DEFAULT`, weights of `encoder`; on the disk.

    Raises `UserError` for a name that the encoder does not have, and where the download fails.
    """
    if encoder not in TORCHVISION:
        raise UserError(
            f"model.weights: torchvision has no weights for {encoder}; set a file or {TIMM}NAME, or a torchvision "
            "encoder",
            "unknown-weights",
        )
    kind = torchvision.models.get_model_weights(encoder)
    family, _, member = name.rpartition(".")
    if (family and family != kind.__name__) or member not in kind.__members__:
        known = ", ".join(f"{OF_TORCHVISION}{kind.__name__}.{key}" for key in kind.__members__)
        raise UserError(
            f"model.weights: {shown(OF_TORCHVISION + name)} are no weights of {encoder}, which has {known}",
            "unknown-weights",
        )
    url = kind[member].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.exists():
        part = _HASH.search(path.name)
        with _downloading(url):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, part and part[1], progress=False)
    return path


def of_timm(name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Tensors of `resnet50.a1_in1k`, or of a model's default weights, as timm loads them; and their SHA-256.

    The hash is that of the file that was downloaded; of the tensors by name where timm has read it from elsewhere.
    Raises `UserError` for a name without weights, and where the download fails.
    """
    timm = import_timm("model.weights")
    known = timm.list_pretrained()
    if name not in (*known, *(tagged.partition(".")[0] for tagged in known)):
        same = [tagged for tagged in known if tagged.partition(".")[0] == name.partition(".")[0]]
        near = difflib.get_close_matches(name, same or known, 1, 0.3)
        hint = f"; did you mean {TIMM}{near[0]}?" if near else ""
        text = f"model.weights: timm {timm.__version__} has no weights {shown(name)}{hint}"
        raise UserError(text, "unknown-weights")
    settings = timm.models.get_pretrained_cfg(name)
    where = f"https://huggingface.co/{settings.hf_hub_id}" if settings.hf_hub_id else settings.url
    with _downloading(where), _quiet("huggingface_hub", "timm"):
        state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    file = _file_of(settings)
    return state, sha256_of(file) if file else sha256_of_tensors(state)


def _file_of(settings):
    """Where a download of timm lies."""
    if settings.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = settings.hf_hub_id.partition("@")
        for name in filter(None, (settings.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(settings.url or "").path).name
    return path if path.is_file() else None


@contextlib.contextmanager
def _downloading(where: str) -> Iterator[None]:
    try:
        yield
    # torch.hub: RuntimeError for another hash; urllib and Hugging Face: subclasses of OSError; timm: RuntimeError.
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"model.weights: {where} could not be downloaded ({shortened(lines[0].rstrip('.'), 100)}); download it on "
            "a machine with a network and set model.weights=FILE",
            "download-failed",
        ) from error


@contextlib.contextmanager
def _quiet(*names):
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
