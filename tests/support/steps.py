"""Training steps of small methods on the CPU."""

import torch

from fastsiam.methods import build_method
from fastsiam.optim.build import build_optimizer
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.step import TrainingStep
from tests.support.gloo_ranks import world as world_of_group

CPU = torch.device("cpu")


def build_step(config, dtype=torch.float64, world=None, compiles=False, method=None):
    """A `TrainingStep` of seeded weights in fp64, whose autocast is to `dtype` where that is a half precision."""
    torch.manual_seed(0)
    world = world or World()
    half = dtype in (torch.bfloat16, torch.float16)
    method = method or build_method(config, world.size, world.rank)
    method = method.to(torch.float32 if half else dtype)
    autocasts = dtype if half else torch.float32
    return TrainingStep(method, build_optimizer(method, config), config, Runtime(world, CPU, autocasts, compiles))


def views_of_step(number, images, size=16, dtype=torch.float64):
    """[2*N, 3, S, S], channels-last: two views of N images that differ, and resemble each other."""
    generator = torch.Generator().manual_seed(number)
    views = torch.randn(2 * images, 3, size, size, generator=generator, dtype=torch.float64)
    views[images:] = 0.5 * views[:images] + views[images:] + 0.3
    return [views.to(dtype, memory_format=torch.channels_last)]


def trained(config, steps):
    """State dict of a step after `steps`, and its losses, on the images of this rank."""
    world = world_of_group() if torch.distributed.is_initialized() else World()
    step = build_step(config, world=world)
    losses = []
    for number in range(1, steps + 1):
        (views,) = views_of_step(number, config.train.batch_size)
        views = views.unflatten(0, (2, -1)).chunk(world.size, 1)[world.rank].flatten(0, 1)
        step([views], number)
        losses.append(step.read().loss)
    return losses, step.state_dict()
