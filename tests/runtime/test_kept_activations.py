"""What Inductor keeps of checkpointed blocks: the input of each, whatever operator a block ends with."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx
from torch.utils.checkpoint import checkpoint

from fastsiam.runtime.compile import keeping_block_inputs

BLOCKS, SIDE = 4, 8
ENDS = {
    "a pointwise operator": torch.sin,
    "a view": lambda x: torch.sin(x).t(),
    "a view of a view": lambda x: torch.sin(x).t().unflatten(0, (2, -1)),
    "one of several results": lambda x: torch.sort(x, stable=True).values,
    "a view of one of several results": lambda x: torch.sort(x, stable=True).values.t(),
}


class Block(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.layers, self.end = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(2))), end

    def forward(self, x):
        return checkpoint(self._inner, x, use_reentrant=False)

    def _inner(self, x):
        first, second = self.layers
        return self.end(second(torch.tanh(first(x.flatten(0, -2)))))


def blocks_of(end):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(end) for _ in range(BLOCKS)))


class Compiled(Exception):
    """Raised in place of running a graph."""


def backward_of(network):
    """The backward graph, and the tensors that it gets besides parameters and the gradient of the result."""
    found = []

    def inner(graph, inputs, **options):
        found.append(graph)
        return run

    def run(*arguments):
        raise Compiled

    backend = functools.partial(compile_fx.compile_fx, inner_compile=inner)
    torch._dynamo.reset()
    patches = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}
    with torch._functorch.config.patch(patches), keeping_block_inputs(), pytest.raises(Compiled):
        torch.compile(network, fullgraph=True, backend=backend)(torch.rand(SIDE, SIDE))
    _, backward = found
    inputs = backward.graph.find_nodes(op="placeholder")
    kept = [node.meta["val"] for node in inputs if not node.name.startswith(("primals_", "tangents_"))]
    return backward, [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("end", ENDS)
def test_the_inputs_of_blocks_are_kept_and_nothing_else(end):
    backward, kept = backward_of(blocks_of(ENDS[end]))
    # Of an operator with several results the gradient needs the others too: here the places of what it sorted.
    several = 2 if "several" in end else 1
    assert [tensor.numel() for tensor in kept] == [SIDE * SIDE] * ((BLOCKS - 1) * several)
    # A block is computed again when its gradient is due. Between two tanh there are the products of the later block's
    # gradients, two for each weight.
    names = [node.name for node in backward.graph.nodes]
    again = [place for place, name in enumerate(names) if name.startswith("tanh")]
    products = [place for place, name in enumerate(names) if name.startswith("mm")]
    between = [sum(first < place < second for place in products) for first, second in itertools.pairwise(again)]
    assert len(again) == BLOCKS
    assert min(between) >= 4


@pytest.mark.slow
@pytest.mark.needs("g++")
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_gradients_are_those_of_eager_mode(end):
    network, images = blocks_of(end), torch.rand(SIDE, SIDE)
    network(images).sum().backward()
    expected = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    torch._dynamo.reset()
    with keeping_block_inputs():
        torch.compile(network, fullgraph=True)(images).sum().backward()
    torch.testing.assert_close([weight.grad for weight in network.parameters()], expected, atol=1e-5, rtol=1e-5)
