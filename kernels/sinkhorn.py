"""Sinkhorn-Knopp: scores of images against prototypes to codes that use every prototype equally."""

import torch


def sinkhorn(scores, epsilon, *, iterations=3, of_all_ranks=None, weights=None):
    """SwAV's codes [B, K] in fp32 or wider: exp(scores / epsilon) scaled by rows and columns.

    The codes of Caron, Misra, Mairal, Goyal, Bojanowski, Joulin (NeurIPS 2020, Eq. 3 and 5). `scores`: [B, K], floating
    point, of B images against K prototypes; `epsilon`: tensor of one value. An iteration divides each column by its sum
    over the images of all ranks, then each row by its sum: rows of the result sum to 1, and columns to B / K as far as
    it has converged. `of_all_ranks(x)` gives [W, *x.shape], the x of each of W ranks; it is called iterations + 1 times
    with [K]. Without it there is one rank. `weights`: [B], 1 for rows that count and 0 for those that do not, whose
    codes mean nothing; None: all count. No score overflows, whatever scores / epsilon is. Gradients reach scores that
    require one, of other ranks where `of_all_ranks` passes them on; SwAV stops them. Raises `ValueError` where scores
    are not [B, K], epsilon is no tensor of one value, or iterations is below 1.

    Plain torch on every device: eager, it reads or writes the matrix about 20 times, twice an iteration for its sums.
    For 4,096 images and 3,000 prototypes (49 MB) that is 0.23 ms at 4.3 TB/s, an H200's, of a step of some hundred. A
    kernel that reads once an iteration would save 0.03 ms of it.
    """
    if scores.ndim != 2 or scores.numel() == 0 or iterations < 1:
        found = f"{tuple(scores.shape)} and {iterations}"
        raise ValueError(f"sinkhorn: scores must be [B, K] and iterations above 0, got {found}")
    if not isinstance(epsilon, torch.Tensor) or epsilon.numel() != 1:
        raise ValueError("sinkhorn: epsilon must be a tensor of one value, such as torch.tensor(0.05)")
    everywhere = of_all_ranks or (lambda x: x.unsqueeze(0))
    dtype = torch.promote_types(scores.dtype, torch.float32)
    # Autocast would multiply in bf16.
    with torch.autocast(scores.device.type, enabled=False):
        logits = scores.to(dtype) / epsilon.to(scores.device, dtype)
        # The first division by columns undoes any factor of a column, and each division by rows any of a row: after
        # both shifts every row and every column holds a 1, and no sum is 0 or infinite.
        counted = logits if weights is None else logits.masked_fill(weights.unsqueeze(1) == 0, -torch.inf)
        logits = logits - everywhere(counted.detach().amax(0)).amax(0)
        peaks = logits.amax(1).detach()
        # Rows that count have peaks up to 0, others any, and infinity times their weight of 0 would be NaN.
        matrix, of_row = (logits - peaks.unsqueeze(1)).exp(), peaks.clamp(max=0).exp()
        for _ in range(iterations):
            of_row = of_row if weights is None else of_row * weights
            of_column = everywhere(of_row @ matrix).sum(0).reciprocal()
            # Sums of 1 both ways multiply it by K / B in each iteration.
            of_column = of_column / of_column.mean()
            of_row = (matrix @ of_column).reciprocal()
        return matrix * of_column * of_row.unsqueeze(1)
