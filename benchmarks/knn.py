"""Exact kNN on a CPU: fastsiam beside faiss's exact index and lightly's knn_predict, from the same features.

50,000 training and 10,000 validation features of 512 dimensions in 100 classes that overlap; k 200, T 0.1. `search` is
the nearest neighbours alone, `accuracy` the search and the vote. The accuracies of all must be equal to 0.05 points:
roundings order neighbours of nearly equal cosines differently.
"""

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness.cli import command
from benchmarks.harness.results import Results
from benchmarks.harness.timing import interleave
from fastsiam.errors import MissingLibraryError, UserError
from fastsiam.evaluate.knn import accuracy, knn_accuracies, nearest

BANK, QUERIES, DIM, CLASSES = 50_000, 10_000, 512, 100
K, TEMPERATURE = 200, 0.1
# lightly's knn_predict takes a batch of queries, as its benchmarks call it.
LIGHTLY_BATCH = 256
ROUNDS = 5
_TOLERANCE = 0.05


def draw_features() -> tuple[torch.Tensor, ...]:
    """Returns bank, its labels, queries and their labels: unit vectors in fp16, around overlapping class centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    found = []
    for count in (BANK, QUERIES):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        rows = centres[labels] + 4.5 * torch.randn(count, DIM, generator=generator)
        found += [F.normalize(rows, dim=1).half(), labels]
    return tuple(found)


def of_fastsiam(bank, bank_labels, queries, truth, what: str):
    if what == "search":
        return nearest(bank, queries, K)[1]
    votes = [(K, TEMPERATURE)]
    return knn_accuracies(bank, bank_labels, queries, truth, votes=votes)[K, TEMPERATURE].top1


def of_faiss(index, bank_labels, queries, truth, what: str):
    """Its index holds fp32 already; the queries are converted on the clock, as ours are, and the vote is ours."""
    similarity, places = map(torch.from_numpy, index.search(queries.float().numpy(), K))
    if what == "search":
        return places
    return accuracy(similarity, bank_labels[places], truth, CLASSES, TEMPERATURE).top1


def of_lightly(predict, bank, bank_labels, queries, truth, what: str):
    """Its bank is fp32 [D, M]; search and vote are one function."""
    parts = [predict(part.float(), bank, bank_labels, CLASSES, K, TEMPERATURE) for part in queries.split(LIGHTLY_BATCH)]
    return 100 * (torch.cat(parts)[:, 0] == truth).double().mean().item()


def variants(features: tuple[torch.Tensor, ...]) -> dict[str, Callable]:
    """Returns functions of `search` or `accuracy` by name; raises `UserError` for a peer that is missing."""
    try:
        import faiss
        from lightly.utils.benchmarking import knn_predict
    except ImportError as error:
        text = f"benchmarks.knn: {error.name} is not installed; pip install faiss-cpu lightly"
        raise MissingLibraryError(text, "no-peer", error.name) from error
    bank, bank_labels, *queries = features
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(DIM)
    index.add(bank.float().numpy())
    return {
        "fastsiam": functools.partial(of_fastsiam, bank, bank_labels, *queries),
        "faiss IndexFlatIP": functools.partial(of_faiss, index, bank_labels, *queries),
        "lightly knn_predict": functools.partial(
            of_lightly, knn_predict, bank.float().T.contiguous(), bank_labels, *queries
        ),
    }


def run(results: Results, *, device: torch.device, minutes: float) -> None:
    """Times search and accuracy in turns, after comparing what they find."""
    if device.type != "cpu":
        raise UserError("--device: the peers are timed on a CPU; give --device cpu", "cpu-only")
    functions = variants(draw_features())
    found = {name: function("accuracy") for name, function in functions.items()}
    if max(found.values()) - min(found.values()) > _TOLERANCE:
        raise RuntimeError(f"knn: the accuracies differ: {found}")
    params = {"bank": BANK, "queries": QUERIES, "dim": DIM, "k": K}
    for what in ("search", "accuracy"):
        # lightly has no search of its own.
        names = [name for name in functions if what == "accuracy" or not name.startswith("lightly")]
        bound = {name: (lambda index, call=functions[name], what=what: call(what)) for name in names}
        seconds = 60 * minutes / 2
        for name, samples in interleave(
            bound, device=device, repeats=ROUNDS, warmup=1, calls=1, seconds=seconds
        ).items():
            more = {"top1": found[name]} if what == "accuracy" else {}
            results.add("knn", name, {"what": what, **params}, samples, **more)


if __name__ == "__main__":
    sys.exit(command(run, "knn", "Time exact kNN.", minutes=10.0))
