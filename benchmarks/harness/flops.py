"""Floating-point operations of a training step, counted by torch on the meta device: nothing is computed."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastsiam
from benchmarks.peers import authors
from fastsiam.config import Config


def flops_per_image(config: Config) -> int:
    """Operations (2 a multiply-add) per source image: two views, forward and backward of the authors' step.

    Convolutions and matrix products are counted, the rest of the step is not: below 1 % for ResNets.
    """
    batch_size, meta = 2, torch.device("meta")
    weights = fastsiam.build_method(config).to(meta).state_dict()
    step = authors.build_step(config, weights, meta)
    views = torch.empty(2 * batch_size, 3, config.views[0].full_size, config.views[0].full_size, device=meta)
    with FlopCounterMode(display=False) as counter:
        step(views)
    return counter.get_total_flops() // batch_size
