#!/usr/bin/env bash
# Activation checkpointing under torch.compile saves no memory where a block ends with a view (a transpose, a reshape)
# or with one of several results of an operator (torch.sort, an operator of one's own with two outputs). torch tags the
# tensor between two checkpointed blocks as one to keep, but the partitioner recomputes views and parts of tuples
# whatever their tag. Nothing is kept between the blocks: the backward pass computes the first one again, from it the
# second, and so on to the last, before it has the first gradient, and holds all their activations at once. Not compiled,
# each block's input is kept and the blocks are computed again one by one. Nothing is said; gradients are right.
#
# Needs Python 3.11 or later; installs torch 2.14.1 into a temporary folder (PY=PYTHON uses one that has torch already,
# TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while torch behaves as described.
# Seen with torch 2.14.1 on a CPU, four blocks of 2 layers:
#   torch 2.14.1
#   blocks end with sin:             3 tensors kept between the blocks; computed again before the first gradient: 1 of 4
#   blocks end with a transpose:     0 tensors kept between the blocks; computed again before the first gradient: 4 of 4
#   blocks end with sort()'s values: 0 tensors kept between the blocks; computed again before the first gradient: 4 of 4
# Way round it: end the block with an operator that computes, or tag the operator behind the view in a pass of one's own
# (torch._inductor.config.joint_custom_post_pass).
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1 numpy
fi
"$PY" - <<'P'
import sys

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

print("torch", torch.__version__)
ENDS = {
    "sin": torch.sin,
    "a transpose": lambda x: torch.sin(x).t(),
    "sort()'s values": lambda x: torch.sort(x, stable=True).values,
}


class Block(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.first, self.second, self.end = nn.Linear(8, 8), nn.Linear(8, 8), end

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)

    def inner(self, x):
        return self.end(self.second(torch.tanh(self.first(x))))


def seen(end):
    """Tensors kept between the blocks, and blocks computed again before the first product of a gradient."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
    )
    network = nn.Sequential(*(Block(end) for _ in range(4)))
    torch.compile(network, fullgraph=True, backend=backend)(torch.rand(8, 8)).sum().backward()
    nodes = list(graphs[-1].graph.nodes)
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    kept = [name for name in inputs if not name.startswith(("primals_", "tangents_"))]
    gradient = next(place for place, node in enumerate(nodes) if node.target is torch.ops.aten.mm.default)
    again = [node for node in nodes[:gradient] if node.target is torch.ops.aten.tanh.default]
    return len(kept), len(again)


found = {name: seen(end) for name, end in ENDS.items()}
for name, (kept, again) in found.items():
    print(
        f"blocks end with {name + ':':16} {kept} tensors kept between the blocks; "
        f"computed again before the first gradient: {again} of 4"
    )
sys.exit(0 if list(found.values()) == [(3, 1), (0, 4), (0, 4)] else 1)
P
