"""kNN accuracy against a loop over the definition."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsiam
from fastsiam.config import load_config
from fastsiam.data.backends.base import EvaluationBatch
from fastsiam.errors import UserError
from fastsiam.evaluate import knn, online
from fastsiam.evaluate.knn import count_correct, extract, knn_accuracy


def features(count, seed, dim=12, classes=5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 2.5 * torch.randn(count, dim, generator=generator), labels


def loop(bank, bank_labels, queries, query_labels, k, temperature):
    correct = 0
    for query, truth in zip(queries.double(), query_labels.tolist(), strict=True):
        similarities = [float(query @ b / query.norm() / b.norm()) for b in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]
        votes = {}
        for i in nearest:
            label = int(bank_labels[i])
            votes[label] = votes.get(label, 0) + math.exp(similarities[i] / temperature)
        correct += max(votes, key=votes.get) == truth
    return 100 * correct / len(queries)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.2), (7, 0.07), (200, 0.2), (60, 0.02)])
def test_equals_the_definition(k, temperature):
    bank, bank_labels = features(120, 0)
    queries, query_labels = features(90, 1)
    expected = loop(bank, bank_labels, queries, query_labels, k, temperature)
    assert knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature) == pytest.approx(
        expected
    )
    assert 25 < expected < 95


def test_the_weights_of_near_neighbours_can_outvote_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), k=3, temperature=0.1) == 100
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=3, temperature=10.0) == 100


def test_chunks_change_nothing(monkeypatch):
    bank, bank_labels = features(50, 2)
    queries, query_labels = features(37, 3)
    whole = knn_accuracy(bank, bank_labels, queries, query_labels, k=9)
    monkeypatch.setattr(knn, "CHUNK", 5)
    assert knn_accuracy(bank, bank_labels, queries, query_labels, k=9) == whole


def test_scale_and_dtype_of_features_do_not_matter():
    bank, bank_labels = features(50, 4)
    queries, query_labels = features(40, 5)
    expected = knn_accuracy(bank, bank_labels, queries, query_labels, k=5)
    assert knn_accuracy(1e-3 * bank, bank_labels, 1e3 * queries, query_labels, k=5) == expected
    assert knn_accuracy(bank.double(), bank_labels, queries.double(), query_labels, k=5) == expected


def test_separate_classes_are_all_right_and_random_labels_are_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(60)
    classes = torch.eye(10)[labels] + 0.05 * torch.randn(600, 10, generator=generator)
    assert knn_accuracy(classes[:300], labels[:300], classes[300:], labels[300:], k=20) == 100
    noise = torch.randn(4000, 10, generator=generator)
    truth = torch.randint(10, (4000,), generator=generator)
    # Chance is 10 %; 2,000 queries have a standard deviation of 0.67.
    assert knn_accuracy(noise[:2000], truth[:2000], noise[2000:], truth[2000:]) == pytest.approx(10, abs=3)


def test_a_class_that_the_bank_lacks_is_never_right():
    bank, labels = features(40, 7)
    assert knn_accuracy(bank, labels, bank, labels + 5, k=3) == 0


def test_nothing_to_compare_is_an_error():
    bank, labels = features(5, 6)
    with pytest.raises(ValueError, match="0 images in the bank"):
        knn_accuracy(bank[:0], labels[:0], bank, labels)
    with pytest.raises(ValueError, match="0 queries"):
        knn_accuracy(bank, labels, bank[:0], labels[:0])


class Allocated(TorchDispatchMode):
    """Sizes in bytes of the storages that operations make, each once."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.kept.append(tensor.untyped_storage())
        return found

    def above(self, size):
        return len({storage.data_ptr() for storage in self.kept if storage.nbytes() >= size})


def test_the_bank_is_in_memory_once_and_the_callers_stays_as_it_is():
    """Features of 400 images in batches of 50: one allocation of their size, and none more for the search."""
    rows, labels = features(400, 8, dim=96)
    parts = zip(rows.split(50), labels.split(50), strict=True)
    batches = [EvaluationBatch(views, part, torch.arange(50).numpy()) for views, part in parts]
    with Allocated() as extracting:
        bank, found = extract(lambda views: 2 * views.bfloat16(), batches, torch.no_grad, 410)
    assert extracting.above(bank.nbytes) == 1
    assert bank.dtype == torch.float32
    assert torch.equal(bank, (2 * rows.bfloat16()).float())
    assert torch.equal(found, labels)
    queries, truth = features(20, 9, dim=96)
    expected, before = knn_accuracy(bank, labels, queries, truth, k=30), bank.clone()
    assert torch.equal(bank, before)
    with Allocated() as searching:
        correct = count_correct(bank, labels, queries, truth, k=30, temperature=0.2)
    assert searching.above(bank.nbytes) == 1
    assert 100 * correct / 20 == expected


def test_a_bank_that_does_not_fit_is_one_sentence(tiny, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(online, "extract", full)
    with pytest.raises(UserError, match="out of memory in kNN.*80 images.*data.val=null") as error:
        fastsiam.pretrain(load_config("quickstart", tiny()))
    assert len(str(error.value)) <= 300
