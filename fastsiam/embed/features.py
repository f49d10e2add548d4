"""Features of all images of a source, kept on the disk as they come, so that a stopped command goes on."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastsiam.data.sources.image_header import UNREADABLE
from fastsiam.data.sources.source import ImageSource
from fastsiam.embed.table import Table, table_of
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols.inputs import Inputs
from fastsiam.run.weight_files import sha256_of_tensors
from fastsiam.runtime.files import read_json, replace_file

DTYPES = {"fp16": np.float16, "fp32": np.float32}
# A stopped command computes no more than this again.
_SAVE_SECONDS = 5.0


@contextlib.contextmanager
def computed(
    inputs: Inputs,
    source: ImageSource,
    asked: argparse.Namespace,
    before: Table | None,
    progress: Callable[[int, int], None],
) -> Iterator[Table]:
    """The table of a source's features: `before` where it holds the very same, otherwise computed or gone on with.

    What has been computed lies in `OUT.partial/` until the block ends without an error. Raises `UserError` where
    `before` holds other features.
    """
    encoder = of_layer(inputs.encoder, asked.layer)
    identity = identity_of(inputs, source, asked)
    if before is not None:
        if before.description["identity"] != identity:
            text = f"--out: {asked.out} holds other features ({before.description['path']}); choose another file"
            raise UserError(text, "other-features")
        yield before
        return
    with _folder(asked.out) as folder:
        rows = Partial(folder, identity, DTYPES[asked.dtype])
        _fill(rows, inputs, source, encoder, progress)
        yield table_of(source, rows.indices(), rows.features(), {**_description(inputs, asked), "identity": identity})
    if asked.out:
        shutil.rmtree(folder)


def of_layer(encoder: nn.Module, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images [B, 3, S, S] to features [B, D] of the module `name` of the encoder; None: its own.

    Maps [B, D, H, W] are averaged over space, tokens [B, T, D] over tokens. Raises `UserError` for an unknown name.
    """
    if name is None:
        return encoder
    modules = dict(encoder.named_modules())
    if name not in modules:
        known = ", ".join(child for child, _ in encoder.named_children())
        raise UserError(f"--layer: the encoder has no {name}; give one of {known}, or a part of one", "no-layer")
    found = []
    modules[name].register_forward_hook(lambda module, given, out: found.append(out))

    def features(images):
        found.clear()
        encoder(images)
        if len(found) != 1 or not isinstance(found[0], torch.Tensor):
            raise UserError(f"--layer: {name} gives no single tensor for a batch; choose another layer", "no-layer")
        out = found[0]
        return out if out.dim() == 2 else out.mean((2, 3)) if out.dim() == 4 else out.mean(1)

    return features


def identity_of(inputs: Inputs, source: ImageSource, asked: argparse.Namespace) -> str:
    """Hash of all that the features depend on: weights, images, crop, layer and formats."""
    facts = (source.fingerprint(), repr(inputs.spec), inputs.crop_ratio, asked.layer, asked.dtype, asked.backend)
    weights = sha256_of_tensors(inputs.encoder.state_dict())
    return hashlib.sha256(repr((weights, *facts, inputs.runtime.names["dtype"])).encode()).hexdigest()


class Partial:
    """Features and indices of the images done so far, in files that outlive the process."""

    def __init__(self, folder: Path, identity: str, dtype: type):
        """Goes on with what the folder holds of the same `identity`."""
        self._folder, self._dtype = folder, np.dtype(dtype)
        said = read_json(folder / "state.json")
        same = said.get("identity") == identity
        self.done, self._width = (said["done"], said["width"]) if same else (0, None)
        self._identity, self._saved_at = identity, time.monotonic()
        if not same:
            for name in ("features", "indices"):
                (folder / name).unlink(missing_ok=True)
        self._files = [open(folder / name, "ab") for name in ("features", "indices")]  # noqa: SIM115
        for file, bytes_of_row in zip(self._files, (self.done and self._row_bytes(), 8), strict=True):
            # What a kill has left beyond the rows that count.
            file.truncate(self.done * bytes_of_row)

    def add(self, features: np.ndarray, indices: np.ndarray) -> None:
        self._width = features.shape[1]
        for file, rows in zip(self._files, (features.astype(self._dtype), indices.astype(np.int64)), strict=True):
            file.write(np.ascontiguousarray(rows).data)
        self.done += len(features)
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Notes as done what has reached the disk: a power cut must not take rows that count."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        said = {"identity": self._identity, "done": self.done, "width": self._width}
        replace_file(self._folder / "state.json", json.dumps(said).encode())
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Keeps what there is; of nothing no folder stays. Raises `OSError` where the disk refuses."""
        with contextlib.ExitStack() as files:
            for file in self._files:
                files.enter_context(file)
            if self.done:
                self.save()
        if not self.done:
            shutil.rmtree(self._folder)

    def indices(self) -> np.ndarray:
        """[n] int64: places in the source, in its order."""
        return np.fromfile(self._folder / "indices", np.int64)

    def features(self) -> np.ndarray:
        """[n, D], mapped from the disk."""
        return np.memmap(self._folder / "features", self._dtype, "r", shape=(self.done, self._width))

    def _row_bytes(self):
        return self._width * self._dtype.itemsize


@torch.no_grad()
def _fill(rows, inputs, source, encoder, progress):
    done = rows.indices()
    rest = np.arange(done[-1] + 1 if len(done) else 0, len(source))
    rest = rest[source.kinds[rest] < UNREADABLE]
    loader = inputs.loader(source)
    batches = loader.batches(rest) if len(rest) else ()
    try:
        # A full disk shows at a write, or at the end.
        with contextlib.closing(rows), contextlib.closing(loader.backend):
            for batch in batches:
                with inputs.runtime.autocast():
                    features = encoder(batch.images).float()
                if not torch.isfinite(features).all():
                    raise UserError(
                        f"ENCODER: the features of {source.name(batch.indices[0])} are not finite", "not-finite"
                    )
                rows.add(features.cpu().numpy(), batch.indices)
                progress(rows.done, len(source))
    except OSError as error:
        raise UserError(f"--out: cannot write ({error.strerror or error}); free the disk, and go on", "disk") from error
    if not rows.done:
        raise UserError(f"SRC: none of the images under {source.root} can be decoded", "no-decodable-images")


def _description(inputs, asked):
    return {
        **inputs.origin["description"],
        "path": inputs.origin["path"],
        "untrained": inputs.origin["untrained"],
        "size": inputs.spec.size,
        "crop_ratio": inputs.crop_ratio,
        "layer": asked.layer,
        "source": asked.source,
        "computed_in": inputs.runtime.names["dtype"],
    }


@contextlib.contextmanager
def _folder(out):
    """OUT.partial beside the file to be; a temporary folder without one."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = out.with_name(f"{out.name}.partial")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write {folder} ({error.strerror or error})", "out-unwritable") from error
    yield folder
