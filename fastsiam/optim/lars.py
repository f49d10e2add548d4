"""LARS (You, Gitman, Ginsburg 2017, arXiv 1708.03888): each tensor's step in proportion to its own norm."""

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradient is rescaled tensor by tensor.

        g' = (g + wd w) eta |w| / (|g| + wd |w| + eps),  v = m v + g',  w = w - lr v

    A tensor w = 0 takes g as it is, and one whose g = 0 gets g' = 0. This is NVIDIA's former apex
    LARC(clip=False) around torch's SGD. Groups with `adapt: False` take g' = g + wd w: plain SGD.

    `params` as in torch.optim; per group `lr`, `momentum` (m), `weight_decay` (wd), `trust` (eta), `eps`, `adapt`. The
    state is one `momentum_buffer` a parameter. Nothing waits for the device, save where a `GradScaler` hands over its
    scale: `.grad` then stays scaled, and a step whose gradients overflowed changes nothing.
    """

    # torch.amp.GradScaler then sets `grad_scale` and `found_inf` around `step`, as for torch's fused optimizers.
    _step_supports_amp_scaling = True

    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0, trust=0.001, eps=1e-8):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps, "adapt": True},
        )

    @torch.no_grad()
    def step(self) -> None:
        # GradScaler reads this on the host itself for every optimizer that is not fused; only fp16 has a scaler.
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(group, params, scale)

    def _update(self, group, params, scale):
        gradients = [parameter.grad for parameter in params]
        if scale is not None:
            gradients = torch._foreach_mul(gradients, scale.double().reciprocal().float())
        weight_decay, ratios = group["weight_decay"], None
        if group["adapt"]:
            ratios = trust_ratios(params, gradients, weight_decay, group["trust"], group["eps"])
        if weight_decay:
            gradients = torch._foreach_add(gradients, params, alpha=weight_decay)
        if ratios is not None:
            gradients = torch._foreach_mul(gradients, ratios.unbind())
        for parameter in params:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["momentum_buffer"] for parameter in params]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(params, velocities, alpha=-group["lr"])


def trust_ratios(weights, gradients, weight_decay: float, trust: float, eps: float) -> torch.Tensor:
    """[n], for n tensors and their gradients: eta |w| / (|g| + wd |w| + eps); 1 where w = 0, and 0 where g = 0."""
    w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
    ratios = torch.where(w == 0, 1.0, trust * w / (g + weight_decay * w + eps))
    return torch.where(g == 0, 0.0, ratios)
