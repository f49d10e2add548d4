"""Torchvision: a state dict in its names, which are the encoder's own."""

from pathlib import Path

from torch import nn

from fastsiam.export.output import put_file, put_sidecar, reading, state_bytes
from fastsiam.export.resnet import is_resnet, resnet_name


def write(encoder: nn.Module, out: Path) -> str:
    """Writes the weights, and a sidecar beside a file other than safetensors; returns the code that loads them."""
    code = _code(encoder, out)
    if out.suffix != ".safetensors":
        put_sidecar(out, encoder, code, {})
    put_file(out, state_bytes(encoder, out.suffix))
    return code


def _code(encoder, out):
    description = encoder.description
    name = description["encoder"]
    if name.startswith(("timm:", "cifar_resnet")) or description["stem"] != "imagenet":
        name = resnet_name(encoder, "torchvision")
    imports = "import torch, torchvision" + (", safetensors.torch" if out.suffix == ".safetensors" else "")
    # Of other networks the classifier alone is missing, which is not always one layer.
    head, strict = ("model.fc = torch.nn.Identity(); ", "") if is_resnet(name) else ("", ", strict=False")
    loaded = f"model.load_state_dict({reading(out)}{strict})"
    return f"{imports}; model = torchvision.models.{name}(); {head}{loaded}; model.eval()"
