"""Two ranks train every method as one does: losses, weights, targets, queues, prototypes and averages."""

import numpy as np
import pytest
import torch

from tests.support.small_methods import METHODS, small_config, trained

STEPS = 20
# What the others compute is of each image alone.
NAMES = [name for name in METHODS if name not in ("asymmetric", "cross entropy", "swav, two views")]


def trained_each(configs):
    return [trained(config, STEPS) for config in configs]


@pytest.mark.slow
def test_two_ranks_train_each_method_as_one(ranks):
    """In float64, by `TrainingStep`; all methods in one group of processes."""
    configs = [small_config(name) for name in NAMES]
    of_ranks = ranks(2, trained_each, configs)
    for number, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
        losses, state = trained(config, STEPS)
        assert max(losses) - min(losses) > 1e-3, name
        mean = np.mean([found[number][0] for found in of_ranks], 0)
        np.testing.assert_allclose(mean, losses, atol=1e-10, rtol=0, err_msg=name)
        for found in of_ranks:
            torch.testing.assert_close(
                found[number][1], state, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
        one, other = (found[number][1] for found in of_ranks)
        # No rank's buffers are sent to the others.
        torch.testing.assert_close(one, other, atol=0, rtol=0)
