"""The log-sum-exp of similarities and its gradients in plain torch, in blocks that stay in a processor's cache.

`torch.mm(out=)` fills one buffer again and again: beside inputs and outputs a call holds 16 MiB at most, whatever N is.
"""

import torch

# A block of 1,024 x 2,048 is 8 MiB in fp32 and stays in an EPYC's 32 MiB of L3: 8,192 rows of 128 take 0.27 s forward
# and backward on two cores, with blocks of 256 x 1,024 0.41 s. Small blocks mean many operations, at whose end threads
# meet: on cores that other processes kept busy, the small ones took 3 to 50 s. Of eight rows of blocks or more
# the diagonal, where both halves are computed, is a small part.
BLOCK_ROWS, LEAST_ROWS = 1024, 256
BLOCK_COLUMNS = 2048
# exp(s / T) of s in [-1, 1] needs no maximum subtracted up to this 1 / T: 8192 exp(40) = 2e21, exp(-40) = 4e-18.
BOUNDED = 40.0


def forward(z, temperature):
    """log sum_{k != i} exp(z_i.z_k / T) [N] over unit rows z [N, D]: each pair's exponential once, for both rows."""
    if not _is_bounded(temperature):
        return forward_between(z, z, temperature, torch.arange(len(z), device=z.device))
    sums, buffer = z.new_zeros(len(z)), _buffer(z, z)
    scaled = z / temperature
    for rows, columns in _triangle(len(z)):
        block = _exponentials(scaled[rows], z[columns], buffer)
        if rows == columns:
            sums[rows] += block.fill_diagonal_(0).sum(1)
        else:
            sums[rows] += block.sum(1)
            sums[columns] += block.sum(0)
    return sums.log_()


def backward(grad, z, temperature, lse):
    """The gradient of z [N, D] where that of `forward` is `grad` [N].

    Row i has sum_k e_ik (a_i + a_k) z_k / T with e = exp(s / T) and a = grad / sum_k e_ik; the weights are symmetric.
    """
    if not _is_bounded(temperature):
        own = torch.arange(len(z), device=z.device)
        return sum(backward_between(grad, z, z, temperature, own, lse))
    weight = grad * torch.exp(-lse)
    out, buffer, weights = torch.zeros_like(z), _buffer(z, z), _buffer(z, z)
    scaled = z / temperature
    for rows, columns in _triangle(len(z)):
        block = _exponentials(scaled[rows], z[columns], buffer)
        both = weights[: block.numel()].view_as(block)
        block.mul_(torch.add(weight[rows, None], weight[columns], out=both))
        if rows == columns:
            block.fill_diagonal_(0)
        else:
            out[columns].addmm_(block.t(), z[rows])
        out[rows].addmm_(block, z[columns])
    return out.div_(temperature)


def forward_between(queries, keys, temperature, own):
    """log sum_j exp(q_i.k_j / T) [n] over all keys [M, D] but key own[i], of each query [n, D]; `own` may be None."""
    lse = queries.new_full((len(queries),), -torch.inf)
    buffer, scaled = _buffer(queries, keys), queries / temperature
    for rows, columns in _rectangle(len(queries), len(keys)):
        block = _similarities(scaled[rows], keys[columns], buffer)
        _fill_own(block, rows, columns, own, -torch.inf)
        lse[rows] = torch.logaddexp(lse[rows], block.logsumexp(1))
    return lse


def backward_between(grad, queries, keys, temperature, own, lse, to_queries=True, to_keys=True):
    """The gradients of queries and keys where that of `forward_between` is `grad` [n]; None for what is not asked."""
    of_queries = torch.zeros_like(queries) if to_queries else None
    of_keys = torch.zeros_like(keys) if to_keys else None
    buffer, scaled = _buffer(queries, keys), queries / temperature
    for rows, columns in _rectangle(len(queries), len(keys)):
        block = _similarities(scaled[rows], keys[columns], buffer).sub_(lse[rows, None]).exp_()
        _fill_own(block, rows, columns, own, 0.0)
        block.mul_(grad[rows, None])
        if to_queries:
            of_queries[rows].addmm_(block, keys[columns])
        if to_keys:
            of_keys[columns].addmm_(block.t(), queries[rows])
    return tuple(None if x is None else x.div_(temperature) for x in (of_queries, of_keys))


def _is_bounded(temperature):
    return 1 / temperature.item() <= BOUNDED


def _buffer(queries, keys):
    # A square on the diagonal has as many columns as rows.
    rows = min(len(queries), _block_rows(len(queries)))
    return queries.new_empty(rows * min(len(keys), max(rows, BLOCK_COLUMNS)))


def _block_rows(count):
    return min(BLOCK_ROWS, max(LEAST_ROWS, count // 8))


def _triangle(count):
    """Slices of rows and columns that hold each pair once: squares on the diagonal, and what is right of them."""
    height = _block_rows(count)
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        yield rows, rows
        for left in range(rows.stop, count, BLOCK_COLUMNS):
            yield rows, slice(left, min(left + BLOCK_COLUMNS, count))


def _rectangle(num_rows, num_columns):
    height = _block_rows(num_rows)
    for start in range(0, num_rows, height):
        for left in range(0, num_columns, BLOCK_COLUMNS):
            rows = slice(start, min(start + height, num_rows))
            yield rows, slice(left, min(left + BLOCK_COLUMNS, num_columns))


def _similarities(queries, keys, buffer):
    block = buffer[: len(queries) * len(keys)].view(len(queries), len(keys))
    return torch.mm(queries, keys.t(), out=block)


def _exponentials(queries, keys, buffer):
    return _similarities(queries, keys, buffer).exp_()


def _fill_own(block, rows, columns, own, value):
    """Writes `value` where a row meets its own key."""
    if own is None:
        return
    place = own[rows] - columns.start
    inside = ((place >= 0) & (place < block.shape[1])).nonzero().squeeze(1)
    block[inside, place[inside]] = value
