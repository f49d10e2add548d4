"""Image sources: folders, text lists, tar shards and .beton files, opened by `open_source`."""


def __getattr__(name):
    if name != "open_source":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Programs of users import it from here. Loaded on first use: the modules of this package import each other.
    from fastsiam.data.sources.open import open_source

    return open_source
