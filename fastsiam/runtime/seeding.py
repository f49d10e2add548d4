"""Torch's random numbers as a function of seed, step and rank, so that no random state has to be kept."""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators of this process, on the CPU and on GPUs, for a step of a rank.

    Dropout and stochastic depth draw by them: a step that is made again draws the same, and each rank its own.
    """
    # Mixed: torch takes 32 bits on a CPU, of which sums of the three would be the same for many steps.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))
