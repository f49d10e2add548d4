"""Linear classifiers on frozen features: all heads of a sweep are trained at once, as one batched problem.

The logits of H heads are one matrix product, and so are their gradients; softmax and cross entropy are written out.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fastsiam.config.model_sections import LARS_TRUST
from fastsiam.optim.lars import trust_ratios
from fastsiam.runtime.distributed import World

ALONE = World()
MOMENTUM = 0.9
# Of apex's LARC, which the authors' code uses.
EPS = 1e-8
# Standard deviation of the first weights in the code of SimSiam, MoCo, SwAV and SimCLR; biases begin at 0.
INITIAL_STD = 0.01
# Rows that are classified at once.
CHUNK = 1024


class LinearHeads:
    """H linear classifiers of C classes on features of D dimensions, in fp32, each with its own rate and weight decay.

    `sgd` is torch's SGD with momentum 0.9. `lars` puts LARC (trust 0.001, clip False) around it, as the authors' linear
    evaluation does: it rescales the bias too, and a tensor of zeros, the bias in its first step, takes its gradient as
    it is.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        rates: Sequence[float],
        weight_decays: Sequence[float],
        optimizer: str,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        world: World = ALONE,
    ):
        """`rates`: learning rates [H] of the whole batch; `weight_decays`: [H]. All heads begin with the same weights.

        torch's own random state stays as it is.
        """
        heads, generator = len(rates), torch.Generator().manual_seed(seed)
        first = torch.randn(classes, dim, generator=generator) * INITIAL_STD
        self.weight = first.expand(heads, -1, -1).to(device, copy=True, memory_format=torch.contiguous_format)
        """[H, C, D]"""
        self.bias = torch.zeros(heads, classes, device=device)
        """[H, C]"""
        self._velocities = [torch.zeros_like(tensor) for tensor in (self.weight, self.bias)]
        self._rates, self._weight_decays = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in (rates, weight_decays)
        )
        self._decays, self._adapts, self._world = any(weight_decays), optimizer == "lars", world
        # Sums since `take_tally`: loss and right answers of each head, and the images.
        self._tally = torch.zeros(2 * heads + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, features: torch.Tensor, labels: torch.Tensor, scale: float = 1.0) -> None:
        """One step of all heads on the mean cross entropy; nothing is read back from the device. All ranks must call.

        `features`: [B, D] of this rank, any floating dtype; `labels`: [B] int64 on their device, -1 for an image that
        does not count; `scale`: factor of all learning rates. The mean is over the labelled images of all ranks.
        """
        features, (heads, classes, dim) = features.float(), self.weight.shape
        known, target = labels >= 0, labels.clamp_min(0)[:, None, None].expand(-1, heads, 1)
        log_p = self._logits(features).log_softmax(2)
        loss = -(log_p.gather(2, target)[..., 0] * known[:, None]).sum(0)
        right = ((log_p.argmax(2) == labels[:, None]) & known[:, None]).sum(0)
        # Of the sum of the losses by the logits: softmax - one-hot.
        by_logits = log_p.exp_().scatter_add_(2, target, target.new_full(target.shape, -1, dtype=log_p.dtype))
        by_logits *= known[:, None, None]
        by_weight = (by_logits.view(-1, heads * classes).T @ features).view(heads, classes, dim)
        sums = self._summed(by_weight, by_logits.sum(0), torch.cat((loss, right, known.sum()[None])))
        count = sums[2][-1].clamp_min(1)
        self._tally += sums[2]
        self._move([total / count for total in sums[:2]], scale)

    @torch.no_grad()
    def right_answers(self, features: torch.Tensor, labels: torch.Tensor, top: Sequence[int] = (1,)) -> torch.Tensor:
        """[len(top), H] float64: on how many of this rank's features the label is among the best k, for k of `top`.

        `features`: [N, D]; `labels`: [N] int64 on the same device.
        """
        found = torch.zeros(len(top), len(self.weight), dtype=torch.float64, device=self.weight.device)
        for rows, truth in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = self._logits(rows.float())
            best = logits.topk(min(max(top), logits.shape[2]), dim=2).indices == truth[:, None, None]
            found += torch.stack([best[..., :k].any(2).sum(0) for k in top])
        return found

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor, top: Sequence[int] = (1,)) -> list[list[float]]:
        """Percent for each k of `top` and each head, over the features of all ranks, which must all call."""
        sums = self._summed(self.right_answers(features, labels, top), labels.new_tensor([len(labels)]).double())
        return (100 * sums[0] / sums[1].clamp_min(1)).tolist()

    def take_tally(self) -> tuple[list[float], list[float], int]:
        """Mean loss and top-1 in percent of each head over the steps since the last call, and the number of images.

        Every prediction was made before the step that learned from it. Waits for the device.
        """
        *sums, count = self._tally.tolist()
        self._tally.zero_()
        heads = len(self.weight)
        means = [total / max(count, 1) for total in sums]
        return means[:heads], [100 * share for share in means[heads:]], int(count)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(("weight", "bias", "weight_velocity", "bias_velocity", "tally"), self._state(), strict=True))

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        for tensor, before in zip(self._state(), saved.values(), strict=True):
            tensor.copy_(before)

    def _state(self):
        return self.weight, self.bias, *self._velocities, self._tally

    def _logits(self, features):
        """[B, H, C]"""
        heads, classes, dim = self.weight.shape
        logits = torch.addmm(self.bias.view(-1), features, self.weight.view(heads * classes, dim).T)
        return logits.view(-1, heads, classes)

    def _summed(self, *tensors):
        """The sums of tensors over all ranks, in one exchange."""
        if self._world.size == 1:
            return tensors
        # Whole numbers among them are exact in fp32 up to 16 million.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def _move(self, gradients, scale):
        """Weights and biases [H, ...] by their gradients."""
        tensors = self.weight, self.bias
        ratios = (None, None)
        if self._adapts:
            # A head has two tensors, each with a norm of its own.
            flat = [[part for tensor in group for part in tensor.unbind()] for group in (tensors, gradients)]
            ratios = trust_ratios(*flat, self._weight_decays.repeat(2), LARS_TRUST, EPS).chunk(2)
        for tensor, gradient, velocity, ratio in zip(tensors, gradients, self._velocities, ratios, strict=True):
            shape = (-1, *(1 for _ in tensor.shape[1:]))
            if self._decays:
                gradient = gradient.addcmul_(tensor, self._weight_decays.view(shape))
            if ratio is not None:
                gradient = gradient.mul_(ratio.view(shape))
            velocity.mul_(MOMENTUM).add_(gradient)
            tensor.addcmul_(velocity, self._rates.view(shape), value=-scale)
