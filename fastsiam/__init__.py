"""SimSiam pretraining at the speed of the hardware. The public names load on first use (PEP 562)."""

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "config",
    "pretrain": "train",
    "build_loader": "data.backends",
    "build_method": "methods",
    "load_encoder": "saved_encoder",
    "knn_accuracy": "evaluation.knn",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
