"""Parts of first_light.sh that are Python: `python -m benchmarks.first_light PART`, in TINY sizes on a CPU too."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.harness.timing import copy_bandwidth, interleave
from fastsiam.config import load_config
from fastsiam.runtime.device import choose_device

# Columns of result lines that are told at the end.
TOLD = (
    "images_per_second", "ms", "share_of_copy_bandwidth", "share_of_L0", "share_of_L1", "teraflops_per_second",
    "peak_memory_bytes", "launches", "first_step_seconds", "limit", "share_of_limit", "passed", "failed", "absent",
)  # fmt: skip
# Matrix products that keep a GPU busy for longer than a batch takes to be made.
PRODUCTS = 60


def ceilings(arguments, device: torch.device) -> int:
    """Measures what predictions rely on: bytes a second of a copy, FLOP a second of a bf16 product."""
    side = 256 if arguments.tiny else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = interleave({"product": lambda index: a @ b}, device=device, repeats=10, seconds=5)
    copied = copy_bandwidth(device, 1 << 22 if arguments.tiny else None)
    found = {"copy_bytes_per_second": copied, "bf16_product_flops": 2 * side**3 / taken["product"].median}
    print(json.dumps(found))
    return 0


def under_load(arguments, device: torch.device) -> int:
    """Compares DALI's views with those made while the device is busy: its buffers must be read before it reuses them.

    Exit code 1 where one differs.
    """
    from benchmarks.loader import files_of, source_of
    from fastsiam.data.backends.choose import open_backend
    from fastsiam.data.loader import Loader

    files, images, batch = files_of(arguments.images), *((128, 32) if arguments.tiny else (1024, 128))
    source = source_of(tuple(files[index % len(files)] for index in range(images)))
    groups = load_config("r50_100ep").view_groups
    cuda = device.type == "cuda"
    weights = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) if cuda else None

    def sums(busy):
        backend = open_backend(arguments.backend, source, (groups[0].spec.size,), batch, 8, device)
        loader = Loader(source, groups, backend, batch_size=batch, seed=0, dtype=torch.bfloat16)
        found = []
        with contextlib.closing(backend):
            for made in loader.epoch(0):
                for _ in range(PRODUCTS if busy else 0):
                    weights @ weights
                found.append(made.views[0].float().sum((1, 2, 3)))
        return torch.stack(found)

    quiet, loaded = sums(busy=False), sums(busy=cuda)
    wrong = int((quiet != loaded).sum())
    largest = (quiet - loaded).abs().max().item()
    print(f"views that differ under load: {wrong} of {quiet.numel()}; largest difference of their sums {largest:g}")
    return int(wrong > 0)


def said(arguments, device: torch.device) -> int:
    """Prints the result lines below a folder, shortened, and those of the training run."""
    for path in sorted([*arguments.results.rglob("*.jsonl"), *arguments.results.rglob("*.dirty")]):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line.get("benchmark"):
                told = {key: line[key] for key in TOLD if line.get(key) is not None}
                rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}
                print(line["benchmark"], line["variant"], *line["params"].values(), rounded)
            elif line.get("kind") in ("knn", "end", "compile") or line.get("step", 1) % 500 == 0:
                keys = ("kind", "step", "loss", "images_per_second", "wait_fraction", "knn_top1", "seconds", "status")
                print("run", {key: line[key] for key in keys if key in line})
    return 0


PARTS = {"ceilings": ceilings, "under-load": under_load, "said": said}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_light", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, for a trial on a CPU")
    parser.add_argument("--images", type=Path, help="folder of JPEGs, for under-load")
    parser.add_argument("--backend", default="dali", help="for under-load")
    parser.add_argument("--results", type=Path, help="folder, for said")
    arguments = parser.parse_args(argv)
    return PARTS[arguments.part](arguments, choose_device(arguments.device))


if __name__ == "__main__":
    sys.exit(main())
