"""Pretraining by SimSiam and its relatives at hardware speed. The public names load on first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsiam import kernels as kernels
    from fastsiam.config import load_config as load_config
    from fastsiam.data.build import build_loader as build_loader
    from fastsiam.evaluate.knn import knn_accuracy as knn_accuracy
    from fastsiam.evaluate.protocols.classifier import load_classifier as load_classifier
    from fastsiam.methods import build_method as build_method
    from fastsiam.run.encoder_file import load_encoder as load_encoder
    from fastsiam.train import pretrain as pretrain

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "config",
    "pretrain": "train",
    "build_loader": "data.build",
    "build_method": "methods",
    "load_encoder": "run.encoder_file",
    "load_classifier": "evaluate.protocols.classifier",
    "knn_accuracy": "evaluate.knn",
}

__all__ = ["__version__", "kernels", *_PUBLIC]


def __getattr__(name):
    if name == "kernels":
        return import_module("fastsiam.kernels")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted(__all__)
