"""Inputs of checkpointed blocks, kept by Inductor as they are in eager mode.

torch tags the tensor between two checkpointed regions as one to keep. Where it is a view or one of several results of
an operator, the partitioner recomputes it all the same (torch 2.11 and 2.14): the backward pass then begins by
computing all blocks again, and its memory is that of a step without checkpointing. Here the operator behind such a
tensor gets the tag.
"""

import operator

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

# Number of the region that a node was traced in, and what the partitioner is to do with the node.
_REGION, _POLICY = "ac_graph_id", "recompute"


class KeepBlockInputs(CustomGraphPass):
    """Pass over a joint graph of forward and backward, as `torch._inductor.config.joint_custom_post_pass`.

    A graph without checkpointed regions stays as it is.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            region = node.meta.get(_REGION)
            if region is not None and any(user.meta.get(_REGION, region) > region for user in node.users):
                _keep(node, region)

    def uuid(self) -> bytes:
        """Key of this code in the compiler's caches."""
        return get_hash_for_files((__file__,))


def _keep(node, region):
    while _shares_memory(node) and node.args[0].meta.get(_REGION) == region:
        node = node.args[0]
    node.meta[_POLICY] = CheckpointPolicy.MUST_SAVE
    for result in node.users:
        # No tuple can be kept: those of its parts that the backward pass needs are.
        if result.target is operator.getitem:
            result.meta[_POLICY] = CheckpointPolicy.MUST_SAVE


def _shares_memory(node):
    return node.target is operator.getitem or getattr(node.target, "is_view", False)
