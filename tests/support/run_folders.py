"""Run folders as runs leave them, made without a run, for the tests of reports."""

import json

import numpy as np
import pytest

from fastsiam.config import load_config
from fastsiam.run.folder import RunFolder, run_path
from fastsiam.runtime.files import write_arrays

PER_EPOCH, STEPS = 40, 30


def train_line(step, **fields):
    where = {"step": step, "epoch": (step - 1) // 10, "images_seen": 4 * step, "train_seconds": 0.5 * step}
    numbers = {"loss": -step / 40, "lr": 0.1, "images_per_second": 8.0 + step, "data_wait_fraction": 0.25}
    return {"kind": "train", **where, "wall_seconds": 0.7 * step, **numbers, **fields}


def at(kind, step, **fields):
    line = train_line(step)
    return {"kind": kind, **{key: line[key] for key in ("step", "epoch", "images_seen", "train_seconds")}, **fields}


def metrics():
    found = [{"kind": "header", "schema": 1, "name": "run"}]
    control = {"control": "untrained", "raw_pixels_knn_top1": 24.5}
    found.append({"kind": "knn", "step": 0, "knn_top1": 31.25, **control})
    for step in range(1, STEPS + 1):
        found.append(train_line(step))
        if step % 10 == 0:
            found.append(at("collapse", step, std_ratio=0.9, effective_rank=5.5 + step, mean_abs_cos=0.25))
            found.append(at("knn", step, knn_top1=50.0 + step))
    return found


def write_run(folder, lines=None, status=None, pictures=True, names="image", **overrides):
    folder.mkdir(parents=True)
    config = load_config("quickstart", [f"{key}={value}" for key, value in overrides.items()])
    (folder / "config.yaml").write_text(config.to_yaml())
    environment = {"torch": "2.14.1", "cpu_cores": 2, "device": "cpu", "images_per_epoch": PER_EPOCH}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "status.json").write_text(json.dumps(status or {"status": "done", "step": 30, "knn_top1": 80.0}))
    text = "".join(json.dumps(line) + "\n" for line in (metrics() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(text)
    if pictures:
        write_pictures(folder / "pictures.npz", names)
    return folder


def write_pictures(path, name, side=32):
    generator = np.random.default_rng(0)

    def images(*shape):
        return generator.integers(0, 256, (*shape, side, side, 3), np.uint8)

    labels = np.array([f"{name} class {index}" for index in range(10)])
    arrays = {"pair_images": images(2, 8), "pair_names": np.array([f"{name}.jpg"] * 8), "pair_labels": labels[:8]}
    arrays |= {"query_images": images(8), "query_names": np.array([f"{name}.jpg"] * 8), "query_labels": labels[:8]}
    arrays |= {"neighbour_images": images(8, 5), "neighbour_names": np.full((8, 5), f"{name}.jpg")}
    arrays |= {"neighbour_labels": labels[generator.integers(0, 10, (8, 5))], "knn_step": np.array(30)}
    arrays |= {"neighbour_similarity": generator.random((8, 5), np.float32), "explained": np.array([0.5, 0.25])}
    arrays |= {"points": generator.normal(size=(100, 2)).astype(np.float32), "point_labels": np.tile(labels, 10)}
    write_arrays(path, arrays)


EVIL = "<script>alert('x')</script>\"&\u202e-\u05d0" + "n" * 300


def run_folder(tmp_path, warn=pytest.fail, **run):
    overrides = {"run.dir": tmp_path, "run.name": "run"} | run
    config = load_config("quickstart", [f"{key}={value}" for key, value in overrides.items()])
    return RunFolder(config, run_path(config), warn)
