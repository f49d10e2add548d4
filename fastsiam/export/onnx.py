"""ONNX: one file that takes any batch and size, with the description in its metadata, checked by onnxruntime."""

import contextlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from fastsiam.errors import UserError
from fastsiam.export.feeding import Feeding
from fastsiam.export.output import put_file

# protobuf's limit of one message.
_MOST_BYTES = 2**31 - 1
_TOLERANCE = 1e-4
_AXES = {0: "batch", 2: "height", 3: "width"}


def write(encoder: nn.Module, out: Path) -> str:
    """Writes `images` [batch, 3, height, width] to `features` [batch, D]; returns the code that loads it.

    Networks that take one size only, as vision transformers do, keep that size. Raises `UserError` where weights are
    beyond 2 GB, and where onnxruntime, if it is installed, gives other features than torch.
    """
    total = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    if total > _MOST_BYTES:
        raise UserError(
            f"ENCODER: its weights take {total / 1e9:.1f} GB, and one ONNX file holds 2 GB; --to safetensors writes it",
            "too-large-for-onnx",
        )
    size = encoder.description.get("size") or 224
    model, takes_any_size = _converted(encoder, size)
    feeding = {key: value for key, value in Feeding.of(encoder)._asdict().items() if value is not None}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in feeding.items()}
    texts |= {"feed": Feeding.of(encoder).text(), "fastsiam": json.dumps(encoder.description)}
    onnx.helper.set_model_props(model, texts)
    data = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime"):
        _check(data, encoder, size, 2 * size if takes_any_size else size)
    put_file(out, data)
    session = f"onnxruntime.InferenceSession({str(out)!r}, providers=['CPUExecutionProvider'])"
    return f"import onnxruntime; model = {session}  # features, = model.run(None, {{'images': float32}})"


def _converted(encoder, size):
    """(model, whether its height and width are free)."""
    automatic = torch.export.Dim.AUTO
    with _quiet():
        example = (torch.zeros(2, 3, size, size),)
        program = torch.export.export(encoder, example, dynamic_shapes=({0: automatic, 2: automatic, 3: automatic},))
        (name,) = program.graph_signature.user_inputs
        shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
        free = {axis: word for axis, word in _AXES.items() if not isinstance(shape[axis], int)}
        options = {"input_names": ["images"], "output_names": ["features"], "dynamic_shapes": (free,)}
        made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, **options)
    return made.model_proto, len(free) == len(_AXES)


@contextlib.contextmanager
def _quiet():
    """Converting warns of matters inside torch and onnxscript."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(data, encoder, size, other):
    """Raises `UserError` unless onnxruntime gives torch's features, for two batches, and two sizes in pixels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in ((1, size, size), (3, other, size)):
        images = torch.randn(batch, 3, height, width, generator=generator)
        with torch.no_grad():
            expected = encoder(images).numpy()
        (found,) = session.run(["features"], {"images": images.numpy()})
        error = np.abs(found - expected).max()
        if not error <= _TOLERANCE * max(1.0, np.abs(expected).max()):
            raise UserError(
                f"ENCODER: onnxruntime gives features that differ by {error:.1g}; nothing was written", "onnx-differs"
            )
