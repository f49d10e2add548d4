"""Torch's random numbers as a function of seed, step and rank, so that no random state has to be kept."""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`, the current one, for a step of a rank.

    Dropout and stochastic depth draw by them: a step that is made again draws the same, and each rank its own.
    """
    # Mixed: torch takes 32 bits on a CPU, of which sums of the three would be the same for many steps.
    mixed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    # torch.manual_seed goes through all kinds of devices: 0.3 ms, of which this takes 2 us.
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)
