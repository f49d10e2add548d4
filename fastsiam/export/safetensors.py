"""safetensors: the file that a run ends with; a checkpoint becomes one by it."""

from pathlib import Path

from torch import nn

from fastsiam.export.output import put_file, state_bytes


def write(encoder: nn.Module, out: Path) -> str:
    """Writes the file with the description in its metadata; returns the code that loads it."""
    put_file(out, state_bytes(encoder, out.suffix))
    return f"import fastsiam; model = fastsiam.load_encoder({str(out)!r})"
