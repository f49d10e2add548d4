"""Sizes of the micro batches into which a batch can be cut, and the refusal of others."""

import math

from fastsiam.errors import UserError


def micro_batch_sizes(batch_size: int, ranks: int = 1) -> list[int]:
    """Returns the values that train.micro_batch can have, ascending: at least 2 images, the same number on each rank.

    They divide `batch_size`, which is one of them; there is none where the ranks cannot share the batch.
    """
    small = [size for size in range(1, math.isqrt(batch_size) + 1) if batch_size % size == 0]
    sizes = sorted({*small, *(batch_size // size for size in small)})
    return [size for size in sizes if size >= 2 and size % ranks == 0]


def check_micro_batch(batch_size: int, micro_batch: int | None, ranks: int = 1) -> None:
    """Raises `UserError` for a train.micro_batch into which the batch of so many ranks cannot be cut."""
    if micro_batch is None or (micro_batch >= 2 and batch_size % micro_batch == 0 and micro_batch % ranks == 0):
        return
    sizes = micro_batch_sizes(batch_size, ranks)
    # A batch that the ranks cannot share is refused as such.
    if not sizes:
        return
    below, above = [size for size in sizes if size < micro_batch], [size for size in sizes if size > micro_batch]
    nearest = " or ".join(str(size) for size in (*below[-1:], *above[:1]))
    if micro_batch > batch_size:
        wrong = f"{micro_batch} is more than train.batch_size={batch_size}"
    elif batch_size % micro_batch:
        wrong = f"{micro_batch} does not divide train.batch_size={batch_size}"
    else:
        wrong = f"{micro_batch} images of all ranks together do not divide by {ranks} ranks"
    raise UserError(f"train.micro_batch: {wrong}; set {nearest}", "micro-batch-not-divisible")
