"""k-nearest-neighbour accuracy of frozen features, the monitor of the paper's authors (k = 200, T = 0.2).

Features are those of the backbone after pooling, l2-normalised; a neighbour votes with exp(similarity / T)
(Wu et al. 2018, section 3.4). Each rank keeps its own part of the bank, in half precision: ImageNet's takes 5.2 GB
with the 2,048 features of ResNet-50, and 0.7 GB on each of 8 ranks.
"""

import torch
import torch.nn.functional as F

from fastsiam.runtime.distributed import World

ALONE = World()
# Similarities of so many queries and so many rows of the bank are held at once: 67 MB in fp32, beside 134 MB for the
# rows of 2,048 features.
CHUNK, BLOCK = 1024, 16_384


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, query_labels, *, k=200, temperature=0.2, world=ALONE) -> float:
    """Return the top-1 accuracy in percent; all ranks must call, and all get the same.

    `bank`: [M, D] and `queries`: [N, D] features of this rank on one device, any floating dtype and length;
    `bank_labels`: [M], `query_labels`: [N] int64. `k` is cut to the size of the whole bank.
    """
    bank_labels, queries, query_labels = (world.gather(rows) for rows in (bank_labels, queries, query_labels))
    if len(bank_labels) == 0 or len(queries) == 0:
        raise ValueError(f"knn_accuracy: {len(bank_labels)} images in the bank and {len(queries)} queries; needs both")
    bank_labels, query_labels = bank_labels.to(queries.device), query_labels.to(queries.device)
    num_classes = int(bank_labels.max()) + 1
    similarity, neighbour = nearest(bank, queries, k, world)
    correct = torch.zeros((), dtype=torch.int64, device=queries.device)
    for near, which, truth in zip(*(rows.split(CHUNK) for rows in (similarity, neighbour, query_labels)), strict=True):
        votes = torch.zeros(len(near), num_classes, device=queries.device)
        votes.scatter_add_(1, bank_labels[which], (near / temperature).exp())
        correct += (votes.argmax(1) == truth).sum()
    return 100 * correct.item() / len(queries)


def nearest(bank, queries, k: int, world: World = ALONE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines [N, k] in fp32 of the most similar rows of the whole bank, best first, and their places [N, k].

    `bank`: [M, D] of this rank, `queries`: [N, D], the same on all ranks. A place counts the rows of all banks in the
    order of ranks, int64. `k` is cut to their number.
    """
    queries = F.normalize(queries.float(), dim=1)
    sizes = world.collect(len(bank))
    k, first = min(k, sum(sizes)), sum(sizes[: world.rank])
    best = queries.new_full((len(queries), k), -torch.inf)
    places = torch.zeros_like(best, dtype=torch.int64)
    # Slices of the queries, and of the tables in which their neighbours are kept.
    chunks = list(zip(queries.split(CHUNK), best.split(CHUNK), places.split(CHUNK), strict=True))
    for start in range(0, len(bank), BLOCK):
        block = F.normalize(bank[start : start + BLOCK].float(), dim=1)
        for asked, near, which in chunks:
            found, rows = (asked @ block.T).topk(min(k, len(block)), dim=1)
            _keep_largest(near, which, torch.cat((near, found), 1), torch.cat((which, rows + first + start), 1))
    if world.size > 1:
        for _, near, which in chunks:
            _keep_largest(near, which, *(world.gather(table.T.contiguous()).T for table in (near, which)))
    return best, places


def _keep_largest(near, which, similarity, places):
    """Writes the k most similar of each row, and their places, into `near` and `which` [n, k]."""
    found, columns = similarity.topk(near.shape[1], dim=1)
    near.copy_(found)
    which.copy_(places.gather(1, columns))


@torch.no_grad()
def extract(encoder, batches, precision, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit features [N, D] in fp16 on the device of the views, and labels [N], of an evaluation loader.

    `encoder` is called as it is: put it into evaluation mode first. `precision()` gives the autocast context. `most`:
    N is no larger; memory is allocated once, for so many.
    """
    labels, features, count = torch.empty(most, dtype=torch.int64), None, 0
    for batch in batches:
        with precision():
            found = encoder(batch.images)
        if features is None:
            features = torch.empty(most, found.shape[1], dtype=torch.float16, device=found.device)
        rows = slice(count, count := count + len(found))
        features[rows], labels[rows] = F.normalize(found.float(), dim=1), batch.labels
    return (torch.empty(0, 0, dtype=torch.float16) if features is None else features[:count]), labels[:count]
