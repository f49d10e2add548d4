"""A small module and its steps, compiled and plain."""

import copy

import torch
from torch import nn


class Net(nn.Module):
    """Batch norm and a layer: running statistics show whether a step ran twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        loss = self.linear(self.norm(x)).square().mean()
        return {"loss": loss, "z": x.detach()}


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def batch(step, size=8):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(step))


def steps(forward, module, sizes):
    """Losses, gradients and buffers of a step for each batch size."""
    found = []
    for step, size in enumerate(sizes):
        module.zero_grad()
        out = forward(batch(step, size))
        out["loss"].backward()
        found.append([out["loss"].detach(), *(p.grad.clone() for p in module.parameters())])
        found[-1] += [buffer.clone() for buffer in module.buffers()]
    return found


def compare(forward, module, sizes=(8, 8, 8)):
    """The steps of `forward` against those of a copy of `module` as it is."""
    plain = copy.deepcopy(module)
    found, expected = steps(forward, module, sizes), steps(plain, plain, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def replaced_backend(monkeypatch, backend):
    """Have `backend(graph, inputs)` compile in place of Inductor."""
    monkeypatch.setattr(torch._inductor, "compile", backend)
