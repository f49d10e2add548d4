"""k-nearest-neighbour accuracy of frozen features, the monitor of the paper's authors (k = 200, T = 0.2).

Features are those of the backbone after pooling, l2-normalised; a neighbour votes with exp(similarity / T)
(Wu et al. 2018, section 3.4).
"""

import torch
import torch.nn.functional as F

# Similarities held at once: [CHUNK, bank] in fp32, 1.3 GB for the 1.28 million images of ImageNet.
CHUNK = 256


def knn_accuracy(bank, bank_labels, queries, query_labels, *, k=200, temperature=0.2) -> float:
    """Top-1 accuracy in percent.

    `bank`: [M, D] and `queries`: [N, D] features of one device, any floating dtype; `bank_labels`: [M],
    `query_labels`: [N] int64. `k` is cut to the size of the bank.
    """
    if len(bank) == 0 or len(queries) == 0:
        raise ValueError(f"knn_accuracy: {len(bank)} images in the bank and {len(queries)} queries; needs both")
    correct = _count(F.normalize(bank.float(), dim=1), bank_labels, queries, query_labels, k, temperature)
    return 100 * correct / len(queries)


@torch.no_grad()
def count_correct(bank, bank_labels, queries, query_labels, *, k, temperature) -> int:
    """Number of queries to which kNN gives their own label; arguments as of `knn_accuracy`.

    A bank in fp32 is normalised in place: that of ImageNet takes 10.5 GB, and a copy as much again.
    """
    bank = bank.float()
    return _count(F.normalize(bank, dim=1, out=bank), bank_labels, queries, query_labels, k, temperature)


def _count(bank, bank_labels, queries, query_labels, k, temperature):
    """`bank`: unit rows in fp32."""
    bank_labels, query_labels = bank_labels.to(bank.device), query_labels.to(bank.device)
    num_classes = int(bank_labels.max()) + 1
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    for chunk, truth in zip(queries.split(CHUNK), query_labels.split(CHUNK), strict=True):
        similarity, neighbour = (F.normalize(chunk.float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
        correct += (votes.argmax(1) == truth).sum()
    return correct.item()


@torch.no_grad()
def extract(encoder, batches, precision, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] fp32 on the device of the views, and labels [N], of all batches of an evaluation loader.

    `encoder` is called as it is: put it into evaluation mode first. `precision()` gives the autocast context. `most`:
    N is no larger; memory is allocated once, for so many.
    """
    labels, features, count = torch.empty(most, dtype=torch.int64), None, 0
    for batch in batches:
        with precision():
            found = encoder(batch.images)
        if features is None:
            features = torch.empty(most, found.shape[1], device=found.device)
        rows = slice(count, count := count + len(found))
        features[rows], labels[rows] = found, batch.labels
    return (torch.empty(0, 0) if features is None else features[:count]), labels[:count]
