"""Mistakes in the section method are one sentence each, with the key and what to set."""

import pytest

from fastsiam.config import load_config
from fastsiam.train import main
from tests.support.refusals import printed_error, refuses, refuses_overrides

MOCO = ("method.name=moco", "train.batch_size=64")
AVERAGE = ("method.name=simsiam_average", "method.images=1000", "train.batch_size=64")

# Overrides of r50_100ep, and the key and code of the error.
MISTAKES = {
    "misspelt name": (["method.name=boyl"], "method.name", "unknown-choice"),
    "misspelt key": (["method.name=byol", "method.momentun=0.9"], None, "unknown-key"),
    "key of another method": (
        ["method.name=byol", "method.temperature=0.1"], "method.temperature", "key-of-another-choice",
    ),
    "head of another method": (
        ["method.name=moco", "method.predictor.hidden=8"], "method.predictor", "key-of-another-choice",
    ),
    "queue below the batch": ([*MOCO, "method.queue=32"], "method.queue", "queue-too-small"),
    "queue below both views": ([*MOCO, "method.symmetric=true", "method.queue=64"], "method.queue", "queue-too-small"),
    "ragged queue": ([*MOCO, "method.queue=100"], "method.queue", "queue-not-divisible"),
    "no queue": ([*MOCO, "method.queue=0"], "method.queue", "out-of-range"),
    "three views of moco": ([*MOCO, "views.count=3"], "method.name", "two-views"),
    "one prototype": (["method.name=swav", "method.prototypes=1"], "method.prototypes", "out-of-range"),
    "negative iterations": (
        ["method.name=swav", "method.sinkhorn_iterations=-1"], "method.sinkhorn_iterations", "out-of-range",
    ),
    "start without a queue": (
        ["method.name=swav", "method.queue_from=0.2"], "method.queue_from", "start-without-queue",
    ),
    "no epsilon": (["method.name=swav", "method.epsilon=0"], "method.epsilon", "out-of-range"),
    "momentum above 1": (["method.name=byol", "method.momentum=1.1"], "method.momentum", "out-of-range"),
    "momentum below 0": (["method.name=moco", "method.momentum=-0.1"], "method.momentum", "out-of-range"),
    "no temperature": (["method.name=simclr", "method.temperature=0"], "method.temperature", "out-of-range"),
    "more targets than views": (["method.target_views=2"], "method.target_views", "too-many-targets"),
    "targets of one direction": (
        ["method.target_views=1", "method.symmetric=false"], "method.target_views", "other-target",
    ),
    "odd views in pairs": (["method.symmetric=false", "views.count=3"], "method.symmetric", "odd-views"),
    "no steps": (["method.name=simsiam_alternating", "method.steps=0"], "method.steps", "out-of-range"),
    "averages without images": (["method.name=simsiam_average"], None, "missing-key"),
    "averages in micro batches": ([*AVERAGE, "train.micro_batch=32"], "train.micro_batch", "average-with-micro-batch"),
    "averages of three views": ([*AVERAGE, "views.count=3"], "method.name", "two-views"),
    "fewer averages than a batch": ([*AVERAGE, "method.images=63"], "method.images", "other-number-of-images"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name):
    refuses_overrides("r50_100ep.yaml", *MISTAKES[name])


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        ([*MOCO, "method.queue=32"], "method.queue=1024"),
        ([*MOCO, "method.queue=100"], "method.queue=64"),
        (["method.target_views=2"], "method.target_views=1"),
        ([*MOCO, "views.count=3"], "views.count=2"),
        ([*AVERAGE, "train.micro_batch=32"], "train.micro_batch=null"),
    ],
)
def test_the_advice_is_a_config_that_is_accepted(overrides, cure):
    with refuses(MISTAKES_BY_OVERRIDES[tuple(overrides)]) as error:
        load_config("r50_100ep.yaml", overrides)
    assert f"set {cure}" in str(error.value)
    load_config("r50_100ep.yaml", [*overrides, cure])


MISTAKES_BY_OVERRIDES = {tuple(overrides): code for overrides, _, code in MISTAKES.values()}


def test_a_micro_batch_that_is_the_whole_batch_cuts_no_average():
    assert load_config("r50_100ep.yaml", [*AVERAGE, "train.micro_batch=64"]).train.micro_batch == 64


def test_the_command_exits_with_2_and_writes_nothing(tmp_path, capsys):
    arguments = ["--config", "r50_100ep", *MOCO, "method.queue=100", f"run.dir={tmp_path}/runs"]
    assert main(arguments) == 2
    assert printed_error(capsys.readouterr().err).code == "queue-not-divisible"
    assert not list(tmp_path.iterdir())
