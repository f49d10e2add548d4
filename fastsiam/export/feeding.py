"""How an encoder wants its images, from its description, in the terms of several libraries."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastsiam.errors import UserError


class Feeding(NamedTuple):
    """Numbers of an encoder's evaluation crop; None where its file does not know them (version 0.1.0)."""

    mean: list[float] | None
    std: list[float] | None
    size: int | None
    """Side of the crop in pixels."""
    crop_ratio: float | None
    """Side of the crop as a share of the short side."""
    interpolation: str | None

    @classmethod
    def of(cls, encoder: nn.Module) -> "Feeding":
        return cls(*(encoder.description.get(key) for key in cls._fields))

    @property
    def unknown(self) -> list[str]:
        return [key for key, value in self._asdict().items() if value is None]

    @property
    def resize(self) -> int | None:
        """The short side in pixels from whose centre the crop is cut: 256 for 224 and 0.875."""
        return None if None in (self.size, self.crop_ratio) else round(self.size / self.crop_ratio)

    def text(self) -> str:
        """A sentence for people; of what is known."""
        if self.unknown:
            return "RGB; the encoder's file does not say more"
        return (
            f"RGB in [0, 1]; short side resized to {self.resize} px ({self.interpolation}, antialiased as by Pillow); "
            f"centre of {self.size} x {self.size} px; minus {self.mean}, divided by {self.std}"
        )


def check_finite(encoder: nn.Module, path: Path) -> None:
    """Raises `UserError` for weights that hold NaN or infinity."""
    for name, value in encoder.state_dict().items():
        broken = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
        if broken:
            raise UserError(
                f"ENCODER: {path} is not finite ({broken:,} of {value.numel():,} values of {name}); export an earlier "
                "checkpoint",
                "weights-not-finite",
            )


def weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of contiguous CPU tensors that share no memory, which safetensors needs."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in encoder.state_dict().items()
    }
