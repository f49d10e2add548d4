"""One step taken apart: its loss, that of each image, gradient norms, and where the first value that is not finite is.

The weights do not move.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastsiam.config.views import ViewGroup
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.micro_batch import micro_batch_of, together

LARGEST = 5


@dataclass(frozen=True)
class Findings:
    """Numbers of a step of N images."""

    loss: float
    """Mean over the batch, before the step moves the weights."""
    losses: np.ndarray | None
    """[N] float64: of each image, the mean over the ordered pairs of its views; None for a loss that is not
    their mean.

    Batch norm couples the images of a batch: where one is not finite, mostly none is."""
    norms: dict[str, float]
    """Gradient norms: `total`, then by part of the method (encoder, projector, predictor)."""
    largest: list[tuple[str, float]]
    """The parameters with the largest gradient norms; those that are not finite come first."""
    first_bad: str | None
    """In words, the first tensor that is not finite, in the order of computation; None where all are finite."""
    bad_images: list[int]
    """Images, of the N, in that tensor's rows that are not finite; empty where the tensor has no row for each image."""

    @property
    def is_finite(self) -> bool:
        return self.first_bad is None


def examine(
    method: nn.Module,
    views: list[torch.Tensor],
    groups: tuple[ViewGroup, ...],
    runtime: Runtime,
    scale: float = 1.0,
    micro_batches: int = 1,
) -> Findings:
    """Forward and backward of `method` on groups of views [V_g*N, 3, S_g, S_g], in training mode.

    `scale`: of the loss in the backward pass (fp16). `micro_batches`: into so many the step cuts the batch. Leaves
    gradients in the parameters.
    """
    num_images = len(views[0]) // groups[0].count
    watch = _Watch(num_images)
    for name, tensor in (*method.named_parameters(), *method.named_buffers()):
        watch.see(f"{name}, before the step", tensor)
    for number, view in enumerate(views):
        watch.see("the views" if len(views) == 1 else f"the views of group {number + 1}", view, by_image=True)
    for parameter in method.parameters():
        parameter.grad = None
    outs = []
    for number in range(micro_batches):
        watch.rows = range(number, num_images, micro_batches)
        with watch.over(method), runtime.autocast():
            loss = method(micro_batch_of(views, number, micro_batches))["loss"]
        watch.see("the loss", loss)
        with watch.over_gradients(method):
            (loss * (scale / micro_batches)).backward()
        outs.append({"loss": loss, **watch.outputs})
    found = together(outs)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    norms = {name: torch.linalg.vector_norm(g, dtype=torch.float64).item() / scale for name, g in gradients.items()}
    return Findings(
        loss=found.pop("loss").item(),
        losses=_losses(found, sum(group.count for group in groups)) if method.is_mean_over_pairs else None,
        norms={"total": _joint(norms.values())} | _by_part(method, norms),
        largest=sorted(norms.items(), key=lambda named: -named[1] if math.isfinite(named[1]) else -math.inf)[:LARGEST],
        first_bad=watch.first,
        bad_images=watch.images,
    )


class _Watch:
    """Looks at tensors in the order of computation and keeps the first one that is not finite."""

    def __init__(self, num_images: int):
        self.rows = range(num_images)
        """Of a view's rows, the images in the batch."""
        self.first: str | None = None
        self.images: list[int] = []
        self.outputs: dict[str, torch.Tensor] = {}
        """Of projector and predictor."""

    def see(self, name: str, tensor: torch.Tensor, by_image: bool = False) -> None:
        """`by_image`: its rows are the first views of the images of `rows`, then the second ones, and so on."""
        if self.first is not None or not tensor.is_floating_point():
            return
        finite = torch.isfinite(tensor.detach())
        if finite.all():
            return
        self.first = name
        if by_image and tensor.ndim and len(tensor) % len(self.rows) == 0:
            rows = (~finite).flatten(1).any(1) if tensor.ndim > 1 else ~finite
            places = rows.view(-1, len(self.rows)).any(0).nonzero().flatten().tolist()
            self.images = [self.rows[place] for place in places]

    @contextlib.contextmanager
    def over(self, method: nn.Module) -> Iterator[None]:
        """Sees the output of every module inside the block."""

        def seeing(name):
            def hook(module, inputs, output):
                if isinstance(output, torch.Tensor):
                    self.see(f"the output of {name}", output, by_image=True)
                    if name in ("projector", "predictor"):
                        self.outputs[name] = output.detach()

            return hook

        handles = [module.register_forward_hook(seeing(name)) for name, module in method.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def over_gradients(self, method: nn.Module) -> Iterator[None]:
        """Sees the gradient of every parameter inside the block, as the backward pass comes to it."""

        def seeing(name):
            return lambda parameter: self.see(f"the gradient of {name}", parameter.grad)

        handles = [
            parameter.register_post_accumulate_grad_hook(seeing(name))
            for name, parameter in method.named_parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _losses(outputs, num_views):
    """[N] of z and p [V*N, d]: minus the mean cosine of p_i and z_j over i != j."""
    unit = {name: F.normalize(output.double(), dim=1) for name, output in outputs.items()}
    z, p = (unit[name].unflatten(0, (num_views, -1)) for name in ("projector", "predictor"))
    cosines = torch.einsum("ind,jnd->nij", p, z)
    off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return (-off_diagonal / (num_views * (num_views - 1))).cpu().numpy()


def _by_part(method, norms):
    found = {}
    for part, _ in method.named_children():
        # A network that follows another has no gradients.
        if inside := [norm for name, norm in norms.items() if name.startswith(f"{part}.")]:
            found[part] = _joint(inside)
    return found


def _joint(norms):
    return math.sqrt(sum(norm * norm for norm in norms))
