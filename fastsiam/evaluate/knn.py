"""k-nearest-neighbour accuracy of frozen features, the monitor of the paper's authors (k = 200, T = 0.2).

Features are those of the backbone after pooling, l2-normalised; a neighbour votes with exp(similarity / T)
(Wu et al. 2018, section 3.4). The search is exact. Each rank keeps its own part of the bank, in half precision:
ImageNet's takes 5.2 GB with the 2,048 features of ResNet-50, and 0.7 GB on each of 8 ranks.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastsiam.evaluate import cpu_search
from fastsiam.runtime.distributed import World

ALONE = World()
# Queries that are compared at once, by the type of device.
CHUNK = {"cpu": 2048, "cuda": 1024}
# Rows of the bank that a GPU compares at once: 134 MB in fp32 with 2,048 features, beside 67 MB of similarities.
BLOCK = 16_384
# Queries whose votes are counted at once.
VOTERS = 1024


class Accuracy(NamedTuple):
    """Percent of the queries whose class has the most votes, or is among the five with the most."""

    top1: float
    top5: float


def knn_accuracy(bank, bank_labels, queries, query_labels, *, k=200, temperature=0.2, world=ALONE) -> float:
    """Return the top-1 accuracy in percent, of one `k` and `temperature`; else as `knn_accuracies`."""
    found = knn_accuracies(bank, bank_labels, queries, query_labels, votes=[(k, temperature)], world=world)
    return found[k, temperature].top1


@torch.no_grad()
def knn_accuracies(
    bank, bank_labels, queries, query_labels, *, votes, world=ALONE
) -> dict[tuple[int, float], Accuracy]:
    """Return the accuracy of each (k, temperature) of `votes`, from one search; all ranks must call, all get the same.

    `bank`: [M, D] and `queries`: [N, D] features of this rank on one device, any floating dtype and length;
    `bank_labels`: [M], `query_labels`: [N] int64. A k is cut to the size of the whole bank.
    """
    bank_labels, queries, query_labels = (world.gather(rows) for rows in (bank_labels, queries, query_labels))
    if len(bank_labels) == 0 or len(queries) == 0:
        raise ValueError(f"knn_accuracy: {len(bank_labels)} images in the bank and {len(queries)} queries; needs both")
    similarity, places = nearest(bank, queries, max(k for k, _ in votes), world)
    labels = bank_labels.to(queries.device)[places]
    query_labels = query_labels.to(queries.device)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    return {(k, t): accuracy(similarity[:, :k], labels[:, :k], query_labels, classes, t) for k, t in votes}


def accuracy(similarity, labels, truth, classes: int, temperature: float) -> Accuracy:
    """The accuracy of votes: cosines [N, k] of neighbours, best first, and their labels; `truth` [N] of the queries.

    Of classes with equal votes the one with the lower number comes first. A class without a vote is never right.
    """
    right = torch.zeros(2, dtype=torch.int64, device=truth.device)
    for near, which, true in zip(*(rows.split(VOTERS) for rows in (similarity, labels, truth)), strict=True):
        votes = count_votes(near, which, classes, temperature)
        mine = votes.gather(1, true[:, None])
        before = torch.arange(classes, device=true.device) < true[:, None]
        rank = ((votes > mine) | ((votes == mine) & before)).sum(1)
        voted = mine[:, 0] > 0
        right += torch.stack([((rank < top) & voted).sum() for top in (1, 5)])
    return Accuracy(*(100 * count / len(truth) for count in right.tolist()))


def count_votes(similarity, labels, classes: int, temperature: float) -> torch.Tensor:
    """Votes fp32 [N, classes] of neighbours as `nearest` gives them: exp((s - s_1) / T), s_1 that of the nearest.

    The shift changes no ranking, and keeps a small T from overflowing.
    """
    votes = torch.zeros(len(similarity), classes, device=similarity.device)
    return votes.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())


def nearest(bank, queries, k: int, world: World = ALONE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines [N, k] in fp32 of the most similar rows of the whole bank, best first, and their places [N, k].

    `bank`: [M, D] of this rank, `queries`: [N, D], the same on all ranks. A place counts the rows of all banks in the
    order of ranks, int64; of equal cosines the lower place comes first. `k` is cut to the number of places.
    """
    sizes = world.collect(len(bank))
    k, first = min(k, sum(sizes)), sum(sizes[: world.rank])
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    places = torch.zeros_like(best, dtype=torch.int64)
    kind = queries.device.type
    search = _SEARCHES[kind](bank, _inverse_norms(bank)) if len(bank) else None
    # Slices of the queries, and of the tables in which their neighbours are kept.
    for asked, near, which in zip(*(rows.split(CHUNK[kind]) for rows in (queries, best, places)), strict=True):
        if len(bank):
            search(F.normalize(asked.float(), dim=1), near, which, first)
        if world.size > 1:
            _keep_largest(near, which, *(world.gather(table.T.contiguous()).T for table in (near, which)))
    return best, places


def _find_on_gpu(bank, scale, queries, near, which, first):
    """As `cpu_search.Search`, with torch's functions alone."""
    for start in range(0, len(bank), BLOCK):
        similarity = queries @ (bank[start : start + BLOCK] * scale[start : start + BLOCK]).float().T
        # Not those equal to the last: places before win.
        above = similarity > near[:, -1:]
        counts = above.sum(1)
        rows, columns = above.nonzero(as_tuple=True)
        ranks = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        found = near.new_full((len(near), int(counts.max())), -torch.inf)
        there = which.new_zeros(found.shape)
        found[rows, ranks], there[rows, ranks] = similarity[rows, columns], columns + start + first
        _keep_largest(near, which, torch.cat((near, found), 1), torch.cat((which, there), 1))


_SEARCHES = {"cpu": cpu_search.Search, "cuda": lambda bank, scale: functools.partial(_find_on_gpu, bank, scale)}


def _keep_largest(near, which, similarity, places):
    """Writes the k most similar of each row, and their places, into `near` and `which` [n, k]; the first of equals."""
    found, columns = similarity.sort(dim=1, descending=True, stable=True)
    k = near.shape[1]
    near.copy_(found[:, :k])
    which.copy_(places.gather(1, columns[:, :k]))


def _inverse_norms(bank):
    """fp32 [M, 1], which make unit rows of the bank's."""
    scale = torch.empty(len(bank), 1, device=bank.device)
    for start in range(0, len(bank), cpu_search.BLOCK):
        rows = bank[start : start + cpu_search.BLOCK].float()
        scale[start : start + cpu_search.BLOCK] = 1 / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return scale


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
