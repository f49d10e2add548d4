"""The config of a run: typed, checked and read before torch is imported."""

from fastsiam.config.schema import (
    CONFIGS,
    OPERATIONAL,
    CheckpointConfig,
    Config,
    RunConfig,
    differences,
    differing_keys,
    load_config,
)

__all__ = [
    "CONFIGS", "OPERATIONAL", "CheckpointConfig", "Config", "RunConfig", "differences", "differing_keys", "load_config",
]  # fmt: skip
