"""Fine-tuned classifiers: an encoder and a linear layer on its features, and their file."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fastsiam.config.yaml_file import shortened
from fastsiam.errors import UserError
from fastsiam.models.encoder import build_encoder
from fastsiam.runtime.files import replace_file

FILE = "model.safetensors"


class Classifier(nn.Module):
    """Images [B, 3, S, S] to logits [B, C]: `fc` on the features of `encoder`."""

    def __init__(self, encoder: nn.Module, num_classes: int):
        """The layer begins at N(0, 0.01) and zeros, as in SimSiam's, SwAV's and SimCLR's evaluations."""
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(encoder.num_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(images))


def save_classifier(model: Classifier, description: dict, path: Path) -> None:
    """Writes `encoder.*`, `fc.weight` [C, D] and `fc.bias` [C] as safetensors, in fp32 and contiguous.

    `description` stands as JSON under `fastsiam` in the metadata: that of the encoder (how to build and to feed it)
    with `classes`, the names in the order of the logits. Raises `UserError` where the disk refuses.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        replace_file(path, save(state, {"fastsiam": json.dumps(description)}))
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror or error})", "out-unwritable") from error


def load_classifier(path: str | Path) -> Classifier:
    """The classifier that `fastsiam evaluate finetune` has saved, in evaluation mode on the CPU.

    `path`: model.safetensors or its folder. `mean` and `std` (3 floats) normalise RGB in [0, 1]; `classes` are names
    by logit; `description` is the dict of the file, with `size` and `crop_ratio` of the views. Raises `UserError` for
    another file; runs no code of it.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {})["fastsiam"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = description["classes"]
        encoder = build_encoder(*(description[key] for key in ("encoder", "stem", "width")), zero_init_residual=False)
        model = Classifier(encoder, len(names))
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = shortened(str(error), 150)
        text = f"{path} is no classifier of fastsiam evaluate finetune ({reason}); give its model.safetensors"
        raise UserError(text, "not-a-classifier") from error
    model.classes, model.description = tuple(names), description
    model.mean, model.std = tuple(description["mean"]), tuple(description["std"])
    return model.eval()
