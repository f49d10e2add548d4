"""Where views come from: sources, draws, backends and the augmenter behind one `Loader` contract.

`config`, `views` and `draws` are read before torch is imported, so the names that need it load on first use.
"""

_LAZY = {"Batch": "loader", "Loader": "loader", "build_loader": "build", "open_source": "sources.open"}

__all__ = list(_LAZY)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
