"""InfoNCE without its matrix of similarities: SimCLR's NT-Xent, its form over several ranks, and MoCo's with a queue.

The positives are one product a row, in plain torch. What needs all pairs is the log-sum-exp of each anchor's
similarities; it is an op, whose forward and backward compute the similarities in blocks (`nt_xent_triton` on CUDA,
`nt_xent_chunked` elsewhere). An op is also what keeps the backward's products in fp32: under autocast a compiled graph
would compute them in bf16. A compiled graph is one for all temperatures because the temperature is a tensor.
"""

import torch
import torch.nn.functional as F

from fastsiam.kernels import nt_xent_chunked, nt_xent_triton
from fastsiam.kernels.reference import SMALLEST_NORM


def nt_xent(z, temperature, *, num_views=2):
    """The mean over anchors and their positives of -log exp(z_i.z_j / T) / sum_{k != i} exp(z_i.z_k / T).

    The loss of SimCLR (Chen, Kornblith, Norouzi, Hinton, ICML 2020, Eq. 1). `z`: [V*N, D], floating point, view after
    view, scaled to unit norm here; the positives of a row are its image's rows in the other V - 1 views. `temperature`:
    tensor of one value, which gets no gradient. Returns a scalar, fp32 or wider, with fp32 arithmetic inside, under
    autocast too. A row of zeros has similarity 0 to all. Memory grows with V*N*D. Raises `ValueError` where z is not
    [V*N, D] with V at least 2, or the temperature no tensor of one value.
    """
    if z.ndim != 2 or num_views < 2 or z.numel() == 0 or len(z) % num_views:
        raise ValueError(f"nt_xent: z must be [V*N, D] with V = {num_views} above 1, got {tuple(z.shape)}")
    z = _unit(z)
    temperature = _scalar("nt_xent", temperature, z)
    views = z.unflatten(0, (num_views, -1))
    pairs = [(views[i] * views[j]).sum(1) for i in range(num_views) for j in range(i)]
    return nt_xent_lse(z, temperature).mean() - torch.stack(pairs).mean() / temperature


def info_nce(queries, keys, positives, temperature, *, selves=None):
    """The mean over queries of -log exp(q_i.k_p / T) / sum_{j != self} exp(q_i.k_j / T), p the positive of query i.

    `nt_xent` of one rank among several: `queries` [n, D] are its rows, `keys` [M, D] all ranks' rows, gathered with
    gradient, `positives` [n] or [n, P] and `selves` [n] (int64) where in `keys` a query's positives and the query
    itself are. The average over ranks of these losses has the value and the gradient of `nt_xent` on all rows. Without
    `selves` no key is left out. Queries and keys both get gradients; otherwise as `nt_xent`.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1] or 0 in (*queries.shape, *keys.shape):
        shapes = tuple(queries.shape), tuple(keys.shape)
        raise ValueError(f"info_nce: queries must be [n, D] and keys [M, D], got {shapes}")
    for name, index in (("positives", positives), ("selves", selves)):
        if index is None:
            continue
        columns = index.shape[1:] if name == "positives" and index.ndim == 2 else ()
        if index.dtype != torch.int64 or index.shape != (len(queries), *columns):
            found = f"{tuple(index.shape)} of {index.dtype}"
            raise ValueError(f"info_nce: {name} must be int64 [n], n = {len(queries)}, got {found}")
    queries, keys = _unit(queries, keys.dtype), _unit(keys, queries.dtype)
    temperature = _scalar("info_nce", temperature, queries)
    columns = positives.view(len(queries), -1).unbind(1)
    pairs = [(queries * keys.index_select(0, column)).sum(1) for column in columns]
    return info_nce_lse(queries, keys, temperature, selves).mean() - torch.stack(pairs).mean() / temperature


def info_nce_queue(queries, keys, queue, temperature):
    """The mean over queries of -log exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum_j exp(q_i.queue_j / T)).

    The loss of MoCo (He, Fan, Wu, Xie, Girshick, CVPR 2020, Eq. 1). `queries` and `keys`: [n, D], scaled to unit norm
    here; `queue`: [K, D], rows of unit norm, used as they are. Gradients reach each of the three that requires one.
    Otherwise as `nt_xent`.
    """
    if queries.ndim != 2 or keys.shape != queries.shape or queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
        shapes = tuple(queries.shape), tuple(keys.shape), tuple(queue.shape)
        raise ValueError(f"info_nce_queue: queries and keys must be [n, D] and queue [K, D], got {shapes}")
    dtype = torch.promote_types(keys.dtype, queue.dtype)
    queries = _unit(queries, dtype)
    temperature = _scalar("info_nce_queue", temperature, queries)
    positive = (queries * _unit(keys, queries.dtype)).sum(1) / temperature
    # log(exp(a) + exp(b)) - a: exact where the loss is far below 1, too.
    return F.softplus(info_nce_lse(queries, queue.to(queries.dtype), temperature, None) - positive).mean()


def _unit(x, other=torch.float32):
    dtype = torch.promote_types(torch.promote_types(x.dtype, other), torch.float32)
    return F.normalize(x.to(dtype), dim=1, eps=SMALLEST_NORM)


def _scalar(name, temperature, z):
    if not isinstance(temperature, torch.Tensor) or temperature.numel() != 1:
        raise ValueError(f"{name}: temperature must be a tensor of one value, such as torch.tensor(0.1)")
    return temperature.detach().to(z.device, z.dtype).reshape(())


def _implementation(z):
    """Of fp64 the chunked one on CUDA too: the products of the kernel are those of TF32."""
    return nt_xent_triton if z.is_cuda and z.dtype == torch.float32 else nt_xent_chunked


@torch.library.custom_op("fastsiam::nt_xent_lse", mutates_args=())
def nt_xent_lse(z: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """log sum_{k != i} exp(z_i.z_k / T), [N], over unit rows z [N, D]."""
    return _implementation(z).forward(z.contiguous(), temperature)


@torch.library.custom_op("fastsiam::nt_xent_lse_backward", mutates_args=())
def nt_xent_lse_backward(
    grad: torch.Tensor, z: torch.Tensor, temperature: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """The gradient of z [N, D], where that of the log-sum-exp is `grad` [N]."""
    return _implementation(z).backward(grad.contiguous(), z.contiguous(), temperature, lse)


@torch.library.custom_op("fastsiam::info_nce_lse", mutates_args=())
def info_nce_lse(
    queries: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor, own: torch.Tensor | None
) -> torch.Tensor:
    """log sum_j exp(q_i.k_j / T), [n], over unit rows: queries [n, D], and of keys [M, D] all but key own[i]."""
    return _implementation(queries).forward_between(queries.contiguous(), keys.contiguous(), temperature, own)


@torch.library.custom_op("fastsiam::info_nce_lse_backward", mutates_args=())
def info_nce_lse_backward(
    grad: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor,
    own: torch.Tensor | None, lse: torch.Tensor, to_queries: bool, to_keys: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of queries and of keys, as far as they are asked for."""
    rows = grad.contiguous(), queries.contiguous(), keys.contiguous()
    found = _implementation(queries).backward_between(*rows, temperature, own, lse, to_queries, to_keys)
    return [gradient for gradient in found if gradient is not None]


@nt_xent_lse.register_fake
def _(z, temperature):
    return z.new_empty(len(z))


@nt_xent_lse_backward.register_fake
def _(grad, z, temperature, lse):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@info_nce_lse.register_fake
def _(queries, keys, temperature, own):
    return queries.new_empty(len(queries))


@info_nce_lse_backward.register_fake
def _(grad, queries, keys, temperature, own, lse, to_queries, to_keys):
    asked = [queries] * to_queries + [keys] * to_keys
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in asked]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _nt_xent_gradient(ctx, grad):
    return nt_xent_lse_backward(grad, *ctx.saved_tensors), None


def _info_nce_gradient(ctx, grad):
    to_queries, to_keys = ctx.needs_input_grad[:2]
    found = info_nce_lse_backward(grad, *ctx.saved_tensors, to_queries, to_keys)
    return found[0] if to_queries else None, found[-1] if to_keys else None, None, None


nt_xent_lse.register_autograd(_nt_xent_gradient, setup_context=_setup_context)
info_nce_lse.register_autograd(_info_nce_gradient, setup_context=_setup_context)
