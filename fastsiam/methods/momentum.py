"""Network that follows another: the target of BYOL, the key encoder of MoCo."""

import copy

import torch
from torch import nn


class Follower(nn.Module):
    """Copy of an encoder and a projector, whose parameters xi follow theirs: xi = m xi + (1 - m) theta, in fp32.

    Batch norm works in training mode on the follower's own views, and its running statistics are its own: in the
    authors' code of BYOL and MoCo buffers are not averaged.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module):
        super().__init__()
        self.encoder, self.projector = copy.deepcopy(encoder), copy.deepcopy(projector)
        self.requires_grad_(False)

    def restart(self, encoder: nn.Module, projector: nn.Module) -> None:
        """Becomes a copy of the others, running statistics included."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.projector.load_state_dict(projector.state_dict())

    @torch.no_grad()
    def follow(self, encoder: nn.Module, projector: nn.Module, momentum: float) -> None:
        """Takes the share 1 - `momentum` of the weights of the others."""
        leaders = [*encoder.parameters(), *projector.parameters()]
        torch._foreach_lerp_(list(self.parameters()), leaders, 1 - momentum)
