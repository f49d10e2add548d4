"""The config of a run: typed, checked and read before torch is imported."""

from fastsiam.config.load import CONFIGS, OPERATIONAL, differences, differing_keys, load_config
from fastsiam.config.schema import CheckpointConfig, Config, RunConfig

__all__ = [
    "CONFIGS", "OPERATIONAL", "CheckpointConfig", "Config", "RunConfig", "differences", "differing_keys", "load_config",
]  # fmt: skip
