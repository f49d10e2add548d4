"""Launches of a step by what they are for, in networks of convolutions, batch norm and ReLU."""

from benchmarks.traffic.count import DGRAD, GENERATED, WGRAD, Launch

FORWARD = "convolutions, forward"
OF_INPUTS = "convolutions, gradients of inputs (dgrad)"
OF_WEIGHTS = "convolutions, gradients of weights (wgrad)"
STATISTICS = "BN statistics"
APPLY = "BN apply (+ add) (+ ReLU), forward"
AGAIN = "BN apply (+ ReLU), again in the backward pass"
REDUCTIONS = "BN backward reductions"
BACKWARD_APPLY = "BN backward apply"
OTHER = "other pointwise, copies, casts, cat"
MAX_POOL = "max pool, forward and backward"
REST = "heads, loss, running statistics"
OPTIMIZER = "optimizer"
CLASSES = (
    FORWARD, OF_INPUTS, OF_WEIGHTS, STATISTICS, APPLY, AGAIN, REDUCTIONS, BACKWARD_APPLY, OTHER, MAX_POOL, REST,
    OPTIMIZER,
)  # fmt: skip

_BY_KERNEL = {
    "convolution": FORWARD, DGRAD: OF_INPUTS, WGRAD: OF_WEIGHTS,
    "batch_norm_statistics": STATISTICS, "batch_norm_apply": APPLY, "batch_norm_apply_again": AGAIN,
    "batch_norm_reduce": REDUCTIONS, "batch_norm_apply_backward": BACKWARD_APPLY,
    "pointwise_gram": STATISTICS, "pointwise_join": FORWARD, "pointwise_dgrad": OF_INPUTS,
    "pointwise_join_dgrad": OF_INPUTS, "pointwise_rows_product": OF_WEIGHTS,
    "max_pool": MAX_POOL, "max_pool_backward": MAX_POOL,
}  # fmt: skip


def class_of(launch: Launch) -> str:
    """The class of a launch of the forward or backward graph.

    A fused kernel can belong to several: with a max pool it is one, then with a reduction, then with a batch norm's
    formula; second stages of reductions go with the first ones.
    """
    if launch.kernel != GENERATED:
        return _BY_KERNEL.get(launch.kernel, REST)
    if any("max_pool" in name for name in launch.operators):
        return MAX_POOL
    if "copy_" in launch.operators and not launch.reduces:
        return REST
    if not launch.has_images:
        of_channels = REDUCTIONS if launch.backward else STATISTICS
        return of_channels if launch.has_channels else REST
    if launch.reduces and (launch.backward or "var_mean" in launch.operators):
        return REDUCTIONS if launch.backward else STATISTICS
    # (x - mean) times a factor of its channel; the average pool behind the last batch norm is fused with it.
    if {"sub", "mul"} <= launch.operators:
        return BACKWARD_APPLY if launch.backward else APPLY
    return OTHER
