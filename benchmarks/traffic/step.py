"""The training step of a config on paper: its launches, bytes and operations by class, as JSON.

`python -m benchmarks.traffic.step CONFIG GPU [KEY=VALUE ...]` prints them for the `fastsiam` that it imports, which may
be that of another commit: of the project it uses the few names that have been there for long.
"""

import contextlib
import importlib
import json
import sys
from unittest import mock

import torch

from benchmarks.traffic.classes import CLASSES, OPTIMIZER, class_of
from benchmarks.traffic.count import Launch
from benchmarks.traffic.gpus import GPUS, Gpu
from benchmarks.traffic.optimizer import launches_of_optimizer
from benchmarks.traffic.schedule import Schedule, schedule
from fastsiam import build_method, load_config

DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VIEW_BY_VIEW = "--view-by-view"


def count(name: str, gpu_name: str, overrides: list[str], view_by_view: bool = False) -> dict:
    """Returns `params` and `classes`: launches, read_bytes, written_bytes, operations and seconds of each class.

    Also `saved_bytes` and `peak_bytes`, as `Schedule` has them. The step is forward, backward and the optimizer's; what
    a method does besides (a momentum encoder's update, a queue) is not counted. `view_by_view`: the encoder once for
    each view in place of once for all.
    """
    gpu = GPUS[gpu_name]
    config = load_config(name, ["data.backend=synthetic", *overrides])
    found = counted(config, gpu, view_by_view)
    launches = [(class_of(launch), launch) for launch in found.launches]
    launches += [(OPTIMIZER, launch) for launch in launches_of_optimizer(_optimizer(config))]
    classes = {kind: _sum([launch for other, launch in launches if other == kind], gpu) for kind in CLASSES}
    params = {
        "config": name.rpartition("/")[2].removesuffix(".yaml"),
        "batch": config.train.batch_size,
        "gpu": gpu_name,
        "precision": str(DTYPES[config.train.precision]).removeprefix("torch."),
        "encoder_calls": "one a view" if view_by_view else "one",
    }
    return {
        "params": params,
        "classes": {kind: numbers for kind, numbers in classes.items() if numbers["launches"]},
        "saved_bytes": found.saved_bytes,
        "peak_bytes": found.peak_bytes,
    }


def counted(config, gpu: Gpu, view_by_view: bool = False) -> Schedule:
    """Forward and backward of a config's method on one rank."""
    method = build_method(config)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    method.to(memory_format=layout)
    dtype = DTYPES[config.train.precision]
    with _calls(view_by_view), _compiled_as_by_the_product():
        return schedule(method, (_views(config, dtype, layout),), gpu, dtype)


def _compiled_as_by_the_product():
    try:
        from fastsiam.runtime.compile import keeping_block_inputs
    except ImportError:
        # Before 2026-11-30 there was none.
        return contextlib.nullcontext()
    return keeping_block_inputs()


def _views(config, dtype, layout):
    groups, batch = getattr(config, "view_groups", None), config.train.batch_size
    if groups is None:
        # Commits before views came in groups take one tensor of them all.
        return _blank(config.views.count * batch, config.views.size, dtype, layout)
    return [_blank(count * batch, spec.size, dtype, layout) for count, spec in groups]


def _blank(number, size, dtype, layout):
    # Never touched: of a large tensor of zeros the pages would be written.
    return torch.empty(number, 3, size, size, dtype=dtype, memory_format=layout)


@contextlib.contextmanager
def _calls(view_by_view):
    if not view_by_view:
        yield
        return
    from fastsiam.methods import base

    with mock.patch.object(base, "gains_by_view", _always):
        yield


def _always(module, images):
    # Not a Mock: Dynamo traces it.
    return True


def _optimizer(config):
    try:
        optim = importlib.import_module("fastsiam.optim.build")
    except ModuleNotFoundError:
        # Where it was before the package was one.
        optim = importlib.import_module("fastsiam.optim")
    return optim.build_optimizer(build_method(config), config)


def _sum(launches: list[Launch], gpu: Gpu) -> dict:
    return {
        "launches": len(launches),
        "read_bytes": sum(launch.read for launch in launches),
        "written_bytes": sum(launch.written for launch in launches),
        "operations": sum(launch.operations for launch in launches),
        "seconds": sum(gpu.seconds(launch.moved, launch.operations) for launch in launches),
    }


def main(arguments: list[str]) -> int:
    name, gpu, *overrides = (argument for argument in arguments if argument != VIEW_BY_VIEW)
    print(json.dumps(count(name, gpu, overrides, VIEW_BY_VIEW in arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
