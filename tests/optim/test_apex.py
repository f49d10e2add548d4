"""optimizer.implementation=apex against packages named apex of every kind; none of them is NVIDIA's own."""

import importlib
import importlib.util
import sys

import pytest
import torch

from benchmarks.peers import AbsentError
from benchmarks.variants.step import build_sgd
from fastsiam.config import load_config
from fastsiam.errors import UserError
from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer, set_learning_rate

# The signatures of apex/optimizers/fused_sgd.py in NVIDIA/apex 6424da3, around what it computes.
FUSED_SGD = """
import torch
class FusedSGD(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, wd_after_momentum=False,
                 materialize_master_grads=True, set_grad_none=False):
        assert not (dampening or nesterov or wd_after_momentum)
        self.given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    def zero_grad(self):
        super().zero_grad()
"""
NVIDIAS = {"apex/__init__.py": "from . import optimizers", "apex/optimizers/__init__.py": FUSED_SGD}


def raising(text):
    """NVIDIA's, whose constructor raises RuntimeError."""
    broken = f"class FusedSGD:\n    def __init__(self, params, **numbers):\n        raise RuntimeError('{text}')"
    return NVIDIAS | {"apex/optimizers/__init__.py": broken}


class OnCuda(torch.nn.Parameter):
    """A parameter that says that it is on a CUDA device."""

    is_cuda = True


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts files in front of everything importable."""

    def files(sources):
        for name, source in sources.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    yield files
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def small(*overrides):
    chosen = ("optimizer.implementation=apex", "optimizer.base_lr=0.4", "train.batch_size=128", "model.width=8")
    return load_config("quickstart", [*chosen, *overrides])


def on_cuda(config):
    """The method of a config, whose parameters say that they are on a CUDA device."""
    method = build_method(config)
    for module in list(method.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, OnCuda(parameter.detach()))
    return method


def told(method=None):
    """Code of the error of an optimizer by apex, which says how to go on without."""
    config = small()
    with pytest.raises(UserError) as error:
        build_optimizer(method or on_cuda(config), config)
    text = str(error.value)
    assert "\n" not in text
    assert "pip install" not in text
    assert "optimizer.implementation=torch" in text
    assert error.value.key == "optimizer.implementation"
    return error.value.code


def test_fused_sgd_gets_the_products_groups_and_numbers(install):
    install(NVIDIAS)
    config = small("optimizer.predictor_lr=fixed", "optimizer.warmup=0")
    method = on_cuda(config)
    optimizer = build_optimizer(method, config)
    assert type(optimizer).__module__ == "apex.optimizers"
    assert optimizer.given == {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4}
    scheduled, held = optimizer.param_groups
    assert {id(p) for p in held["params"]} == {id(p) for p in method.predictor.parameters()}
    assert len(scheduled["params"]) + len(held["params"]) == len(list(method.parameters()))
    set_learning_rate(optimizer, config, 0.5)
    assert (scheduled["lr"], held["lr"]) == (pytest.approx(0.1), pytest.approx(0.2))


def test_the_ablation_measures_the_products_apex(install):
    install(NVIDIAS)
    config = small("optimizer.implementation=torch")
    optimizer = build_sgd("apex", on_cuda(config), config)
    assert type(optimizer).__module__ == "apex.optimizers"
    assert optimizer.given == {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4}


def test_without_apex_it_says_how_it_is_built(monkeypatch):
    # NVIDIA's containers have it.
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert told() == "no-apex"
    with pytest.raises(AbsentError, match="apex is not installed; build it from source"):
        build_sgd("apex", on_cuda(small()), small())


@pytest.mark.parametrize(
    ("sources", "code"),
    [
        # A clone in the working directory is importable as a namespace.
        ({f"apex/{name}": source for name, source in NVIDIAS.items()}, "no-apex"),
        # Another project's is never run.
        ({"apex/__init__.py": "raise SystemExit('another project runs')", "apex/models.py": ""}, "other-apex"),
        (raising("apex.optimizers.FusedSGD requires cuda extensions"), "apex-without-cuda"),
    ],
)
def test_what_is_not_nvidias_apex_with_its_extensions_is_refused(install, sources, code):
    install(sources)
    assert told() == code


def test_another_error_of_its_constructor_stays_what_it_is(install):
    install(raising("CUDA error: out of memory"))
    with pytest.raises(RuntimeError, match="^CUDA error: out of memory$"):
        build_optimizer(on_cuda(small()), small())


def test_parameters_on_the_cpu_are_refused_whatever_is_installed(install):
    install(NVIDIAS)
    assert told(build_method(small())) == "apex-needs-cuda"
