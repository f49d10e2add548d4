"""Linear evaluation of one encoder: seconds and top-1 of lightly's protocol, of ours and of ours on cached features.

`python -m benchmarks.linear ENCODER --data FOLDER --out DIR`, where FOLDER has train/CLASS/ and val/CLASS/. Each row is
one whole evaluation, from the files to the accuracy of the last epoch: lightly's LinearClassifier under Lightning's
Trainer with a DataLoader, as its benchmark builds them, but with validation after the last epoch alone; ours with the
same optimizer and rate; ours cached, with a sweep of rates chosen on held-out training images; scikit-learn's logistic
regression on the cached features.
"""

import argparse
import contextlib
import io
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from benchmarks import peers
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.peers import AbsentError
from benchmarks.race.subset import write_list
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.evaluate.protocols import inputs, linear
from fastsiam.run.encoder_file import load_encoder
from fastsiam.runtime.cores import usable_cores
from fastsiam.runtime.device import choose_device
from fastsiam.runtime.distributed import World

RATES = "0.003,0.01,0.03,0.1,0.3"


@dataclass(frozen=True)
class Case:
    """What all rows share."""

    encoder: Path
    train: Path
    """Text lists of images with labels."""
    val: Path
    epochs: int
    batch_size: int
    passes: int
    device: torch.device

    def parsed(self, *more: str) -> argparse.Namespace:
        """The arguments of `fastsiam evaluate linear` with SGD, lightly's optimizer."""
        parser = argparse.ArgumentParser()
        linear.add_arguments(parser)
        words = [self.encoder, "--train", self.train, "--val", self.val, "--epochs", self.epochs]
        words += ["--batch-size", self.batch_size, "--optimizer", "sgd", "--device", self.device.type, *more]
        return parser.parse_args([str(word) for word in words])


class Labelled(Dataset):
    """Images of a list as torchvision's ImageFolder opens them."""

    def __init__(self, path: Path, transform):
        self._source, self._transform = open_source(str(path)), transform

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._transform(default_loader(self._source.path(index))), int(self._source.labels[index])


def lightly(case: Case) -> dict:
    """lightly's protocol: the encoder in fp32 in every epoch."""
    try:
        from lightly.utils.benchmarking import LinearClassifier
        from pytorch_lightning import Trainer
    except ImportError as error:
        raise AbsentError(f"lightly is not installed; pip install lightly ({error})") from error
    encoder = load_encoder(case.encoder)
    size = encoder.description["size"]
    last = [transforms.ToTensor(), transforms.Normalize(encoder.mean, encoder.std)]
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    centre = [
        transforms.Resize(round(size / (encoder.description.get("crop_ratio") or 0.875))),
        transforms.CenterCrop(size),
    ]
    train, val = (
        DataLoader(
            Labelled(path, transforms.Compose([*begin, *last])),
            case.batch_size,
            shuffle=path == case.train,
            drop_last=path == case.train,
            num_workers=usable_cores(),
            persistent_workers=True,
            multiprocessing_context="forkserver",
        )
        for path, begin in ((case.train, crop), (case.val, centre))
    )
    classes = len(train.dataset._source.classes)
    model = LinearClassifier(
        encoder, case.batch_size, feature_dim=encoder.num_features, num_classes=classes, topk=(1, min(5, classes))
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    where = {"accelerator": "gpu" if case.device.type == "cuda" else "cpu", "devices": 1}
    trainer = Trainer(
        max_epochs=case.epochs, check_val_every_n_epoch=case.epochs, num_sanity_val_steps=0, **where, **quiet
    )
    trainer.fit(model, train, val)
    return {"top1": 100 * float(trainer.callback_metrics["val_top1"]), "description": "fp32, Lightning's Trainer"}


def ours(case: Case, *more: str) -> dict:
    """`fastsiam evaluate linear`."""
    arguments = case.parsed(*more)
    with contextlib.redirect_stdout(io.StringIO()):
        line = linear.measure(arguments, linear.sweep_of(arguments), World())
    return {"top1": line["top1"], "description": f"{line['dtype']}, lr {line['base_lr']:g}, {line['features']}"}


def regression(case: Case) -> dict:
    """scikit-learn on the features of the cached passes, its default penalty."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise AbsentError(f"scikit-learn is not installed; pip install scikit-learn ({error})") from error
    arguments = case.parsed("--cached", "--passes", str(case.passes))
    with inputs.opened(linear.for_decoding(arguments, World())) as opened:
        task = linear.Task(opened, linear.sweep_of(arguments), *opened.labelled())
        cached = task.features()
        cached.fill()
        val, val_labels = (tensor.cpu().float().numpy() for tensor in task.queries())
        parts = [part for number in range(case.passes) for part in cached.epoch(number)]
    known = [part.labels >= 0 for part in parts]
    rows = torch.cat([part.features[mask] for part, mask in zip(parts, known, strict=True)]).cpu().float().numpy()
    labels = torch.cat([part.labels[mask] for part, mask in zip(parts, known, strict=True)]).cpu().numpy()
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    with warnings.catch_warnings():
        # It may stop at max_iter, which costs it no accuracy here.
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=0.01, max_iter=300).fit((rows - mean) / std, labels)
    top1 = 100 * float(np.mean(model.predict((val - mean) / std) == val_labels))
    return {"top1": top1, "description": "scaled features, C 0.01"}


ROWS = {
    "lightly": lightly,
    "fastsiam": lambda case: ours(case),
    "fastsiam cached": lambda case: ours(case, "--cached", "--passes", str(case.passes)),
    "fastsiam cached, 5 rates": lambda case: ours(case, "--cached", "--passes", str(case.passes), "--lr", RATES),
    "scikit-learn": regression,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.partition("\n")[0])
    parser.add_argument("encoder", type=Path, help="a run folder, encoder.safetensors or checkpoint.pt")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--classes", type=int, default=20, help="the first so many (%(default)s)")
    parser.add_argument("--train", type=int, default=5000, help="training images, equally many a class (%(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="validation images, likewise (%(default)s)")
    parser.add_argument("--epochs", type=int, default=90, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--passes", type=int, default=4, help="cached ones (%(default)s)")
    parser.add_argument("--rows", default=";".join(ROWS), help="between semicolons (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="folder for linear.jsonl; without it lines are only printed")
    asked = parser.parse_args(argv)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # Workers of the peer begin as forks of a process that has imported what they need.
    multiprocessing.set_forkserver_preload(["torch", "torchvision.transforms", peers.__name__])
    device = choose_device(asked.device)
    results = Results(asked.out, device)
    params = {"images": asked.train, "classes": asked.classes, "epochs": asked.epochs, "batch": asked.batch}
    try:
        with tempfile.TemporaryDirectory() as folder:
            lists = [
                write_list(asked.data / split, count, Path(folder), f"--{split}", asked.classes)
                for split, count in (("train", asked.train), ("val", asked.val))
            ]
            case = Case(asked.encoder, *lists, asked.epochs, asked.batch, asked.passes, device)
            # What is compiled on the first call of all, numba's kernels among it, is no part of an evaluation.
            ours(replace(case, epochs=1), "--cached", "--passes", "1")
            for name in asked.rows.split(";"):
                began = time.perf_counter()
                try:
                    found = ROWS[name.strip()](case)
                except AbsentError as error:
                    results.add("linear", name, params, None, absent=str(error))
                    continue
                results.add("linear", name, params, Samples((time.perf_counter() - began,)), **found)
    except UserError as error:
        print(f"benchmarks: {error} [{error.code}]", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
