"""benchmarks.distributed: its rows are the same training where they should be, taken in turns by all ranks."""

import fcntl
import json
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import distributed as benchmark
from benchmarks.harness import ranks as ranks_module
from benchmarks.harness.cli import command
from benchmarks.harness.ranks import in_ranks, in_turns
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.peers import AbsentError
from benchmarks.variants import gradient_reduction
from benchmarks.variants.gradient_reduction import Way, build_step
from fastsiam.errors import UserError
from fastsiam.models.batch_norm import split_statistics
from fastsiam.optim.build import build_optimizer
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.step import TrainingStep
from tests.support.bench_configs import CPU, small_config
from tests.support.gloo_ranks import world
from tests.support.networks import one_layer
from tests.support.processes import REPOSITORY

STEPS = 3


def trained(config, way, backend="aot_eager"):
    """Losses of this rank's steps, the weights after them, gradients of every step, and the number of graphs."""
    torch._dynamo.reset()
    real = torch._dynamo.lookup_backend
    torch._dynamo.lookup_backend = lambda name: real(backend)
    # Of DDP and of its optimiser: the first bucket, which the small model would not fill.
    bucket_bytes, dist._DEFAULT_FIRST_BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, 20_000
    try:
        mine = world()
        step = build_step(way, config, CPU, torch.float32, mine)
        views = benchmark.views_of_rank(config, CPU, torch.float32, mine)
        losses, gradients = [], []
        for number in range(STEPS):
            losses.append(step(views[number % 2]).item())
            gradients.append([parameter.grad.clone() for parameter in step.module.parameters()])
        step.check()
        return losses, step.module.state_dict(), gradients, step.graphs()
    finally:
        torch._dynamo.lookup_backend = real
        dist._DEFAULT_FIRST_BUCKET_BYTES = bucket_bytes


@pytest.fixture(scope="module")
def rows(ranks):
    """What two ranks come to, by row."""
    config = small_config(2, "model.encoder=cifar_resnet8", "model.width=8", "optimizer.base_lr=1.0")
    names = set(benchmark.ROWS) - {"nn.SyncBatchNorm", "no communication, compiled", "gradients only, in pieces"}
    return {name: ranks(2, trained, config, benchmark.ROWS[name]) for name in sorted(names)}


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a[0] == pytest.approx(b[0], abs=2e-5)
        for key, value in a[1].items():
            torch.testing.assert_close(value, b[1][key], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(a[2], b[2], rtol=1e-3, atol=2e-5)


def test_rows_that_exchange_the_same_are_the_same_training(rows):
    for eager, *others in (
        ("fastsiam", "fastsiam, compiled", "compiled in pieces"),
        ("gradients only", "gradients only, compiled"),
    ):
        for other in others:
            same(rows[other], rows[eager])
    apart = [rows[name][0][0][-1] for name in ("fastsiam", "gradients only", "no communication")]
    assert all(abs(one - other) > 1e-3 for one, other in pairwise([*apart, apart[0]]))


def test_what_is_exchanged_shows_in_gradients_and_statistics(rows):
    for name, way in benchmark.ROWS.items():
        if name in rows:
            (_, first, gradients, _), (_, second, others, _) = rows[name]
            averaged = all(torch.equal(a, b) for a, b in zip(gradients[0], others[0], strict=True))
            means = [key for key in first if key.endswith("running_mean")]
            shared = all(torch.allclose(first[key], second[key], atol=1e-6) for key in means)
            assert (averaged, shared) == (way.gradients, way.statistics == "all ranks"), name


def test_graphs_are_one_or_a_piece_a_bucket(rows):
    graphs = {name: found[0][3] for name, found in rows.items()}
    assert graphs["fastsiam, compiled"] == graphs["gradients only, compiled"] == 1
    assert graphs["compiled in pieces"] > 1
    assert graphs["fastsiam"] == 0


def gradients_in_buckets(compiles):
    """Of three steps of the trainer's step, whose DDP has gradients as views of its buckets, on one small method."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mine = world()
    method = split_statistics(one_layer(), 2, mine.size)
    method.constant_lr_parameters = list
    config = small_config(2, "optimizer.base_lr=1.0")
    optimizer = build_optimizer(method, config)
    torch._dynamo.config.optimize_ddp = False
    step = TrainingStep(method, optimizer, config, Runtime(mine, CPU, torch.float32, compiles))
    generator = torch.Generator().manual_seed(mine.rank)
    found = []
    for number in range(STEPS):
        loss = step(torch.randn(16, 3, 16, 16, generator=generator), number)["loss"].item()
        found.append([torch.tensor(loss), *(parameter.grad.clone() for parameter in method.parameters())])
    return found, compiles and step.compiled.report()["graphs"]


def test_gradients_of_one_compiled_graph_in_buckets_are_those_of_eager(ranks):
    eager, compiled = (ranks(2, gradients_in_buckets, compiles) for compiles in (False, True))
    for (expected, _), (found, told) in zip(eager, compiled, strict=True):
        assert told == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert all(a[1].abs().max() > 1e-3 for a in expected)
    # Averaged: the same on both ranks, though their images differ.
    (first, _), (second, _) = compiled
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
    assert first[0][0] != second[0][0]


def turns_of_a_rank():
    called = []
    functions = {name: (lambda index, name=name: called.append((name, index))) for name in "abc"}
    taken = in_turns(world(), CPU, functions, together=2, warmup=1, repeats=3)
    return called, taken and {name: len(samples.seconds) for name, samples in taken.items()}


def test_ranks_take_turns_as_the_first_one_says(ranks):
    (first, taken), (second, nothing) = ranks(2, turns_of_a_rank)
    assert first == second
    assert first[::2] == [
        ("a", 0), ("b", 0), ("c", 0),
        ("a", 2), ("b", 2), ("c", 2),
        ("b", 4), ("c", 4), ("a", 4),
        ("c", 6), ("a", 6), ("b", 6),
    ]  # fmt: skip
    assert first[1::2] == [(name, index + 1) for name, index in first[::2]]
    assert (taken, nothing) == ({"a": 3, "b": 3, "c": 3}, None)


def slow_rank():
    """Two calls a sample, of which the second rank's take 0.05 s each."""
    mine = world()
    taken = in_turns(mine, CPU, {"a": lambda index: time.sleep(0.05 * mine.rank)}, together=2, warmup=1, repeats=3)
    return taken and taken["a"].median


def test_a_sample_ends_with_the_slowest_rank(ranks):
    seconds, _ = ranks(2, slow_rank)
    assert seconds > 0.05


def test_samples_are_seconds_a_call(monkeypatch):
    monkeypatch.setattr(
        ranks_module, "interleave", lambda functions, **_: dict.fromkeys(functions, Samples((6.0, 9.0)))
    )
    assert in_turns(World(), CPU, {"a": print}, together=3) == {"a": Samples((2.0, 3.0))}


def fails_on_the_second(world, device):
    if world.rank == 1:
        raise IndexError("nothing there")
    world.barrier()


def test_a_process_that_fails_ends_the_others():
    with pytest.raises(torch.multiprocessing.ProcessException):
        in_ranks(2, "cpu", fails_on_the_second)


def wait_for_ever(world, device, folder):
    """Holds a lock on a file, which ends with the process."""
    with open(folder / str(world.rank), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("locked")
        file.flush()
        threading.Event().wait()


KILLED = """
import sys, pathlib
from benchmarks.harness.ranks import in_ranks
from tests.benchmarks.test_distributed import wait_for_ever
in_ranks(2, "cpu", wait_for_ever, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_ranks_of_a_killed_benchmark_end(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=REPOSITORY)
    wait_until(lambda: {path.name for path in tmp_path.iterdir() if path.read_text() == "locked"} == {"0", "1"})
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_locked(path) for path in tmp_path.iterdir()))


def is_locked(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(reached):
    deadline = time.monotonic() + 100
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_lines_of_a_run_with_little_time(tmp_path, monkeypatch):
    path = tmp_path / "small.yaml"
    path.write_text(small_config(2, "model.encoder=cifar_resnet8", "model.width=8").to_yaml())
    monkeypatch.setattr(benchmark, "SETTINGS", {"cpu": (str(path), 4)})
    benchmark.run(Results(tmp_path, CPU), device=CPU, minutes=0)
    found = {}
    for text in (tmp_path / "distributed.jsonl").read_text().splitlines():
        line = json.loads(text)
        found[line["variant"]] = line
        assert line["params"] | {"threads a rank": 1} == {
            "encoder": "cifar_resnet8", "size": 16, "batch": 8, "ranks": 2, "threads a rank": 1,
            "precision": "float32", "collectives": "gloo",
        }  # fmt: skip
    assert tuple(found) == benchmark.TABLE
    absent = {name for name, line in found.items() if line.get("absent") == benchmark.NO_TIME}
    assert set(found) - absent == {"one process", "no communication", "fastsiam", benchmark.ALL_REDUCE}
    for name, images in (("one process", 4), ("fastsiam", 8)):
        assert found[name]["images_per_second"] == pytest.approx(images / found[name]["median_seconds"])
        assert len(found[name]["samples_seconds"]) == 3
    assert found[benchmark.ALL_REDUCE]["bytes"] == 4 * _parameters()
    assert found["no communication"]["share_of_silent"] == 1


def _parameters():
    method = gradient_reduction.build_method(small_config(2, "model.encoder=cifar_resnet8", "model.width=8"))
    return sum(parameter.numel() for parameter in method.parameters())


class Built:
    """Rows as `_numbers` reads them."""

    def __init__(self, *names):
        self.absent, self.world, self.config = {"compiled in pieces": "why"}, World(0, 4, 0, 4), small_config(2)
        self.built = {name: benchmark.Row(None, self._step(name), 7.0) for name in names}
        self.gradient_bytes = 12

    def _step(self, name):
        compiled = "compiled" in name
        return gradient_reduction.Step(
            nn.Identity(), None, lambda: int(compiled), None, Way("one graph" if compiled else None)
        )


def test_shares_are_against_rows_that_are_compiled_alike():
    seconds = {
        "one process": 1.0, "one process, compiled": 0.5, "no communication": 2.0, "no communication, compiled": 0.8,
        "fastsiam": 4.0, "fastsiam, compiled": 1.0, benchmark.ALL_REDUCE: 0.1,
    }  # fmt: skip
    taken = {name: Samples((second,)) for name, second in seconds.items()}
    rows = Built(*seconds)
    found = {name: benchmark._numbers(name, rows, taken) for name in (*seconds, "compiled in pieces")}
    batch = small_config(2).train.batch_size
    shares = {name: (n.get("share_of_silent"), n.get("efficiency")) for name, (_, n) in found.items()}
    assert shares["fastsiam"] == (0.5, 0.25)
    assert shares["fastsiam, compiled"] == (0.8, 0.5)
    assert shares["one process"] == (None, None)
    assert found["fastsiam"][1]["images_per_second"] == batch / 4
    assert found["one process"][1]["images_per_second"] == batch / 4
    assert found[benchmark.ALL_REDUCE][1] == {"bytes": 12}
    assert found["compiled in pieces"] == (None, {"absent": "why"})


def test_what_cannot_run_says_why(tmp_path, monkeypatch):
    with pytest.raises(AbsentError, match=r"torch\.nn\.SyncBatchNorm needs a CUDA device"):
        build_step(benchmark.ROWS["nn.SyncBatchNorm"], small_config(), CPU, torch.float32, World(0, 2, 0, 2))
    with pytest.raises(UserError, match="--ranks: 1 has nobody to exchange gradients with; give 2 or more"):
        benchmark.run(Results(None, CPU), device=CPU, minutes=1, ranks=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(benchmark, "choose_precision", lambda *_: torch.bfloat16)
    benchmark.run(Results(tmp_path, CPU), device=torch.device("cuda"), minutes=1, ranks=4)
    lines = [json.loads(text) for text in (tmp_path / "distributed.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(benchmark.TABLE)
    assert {line["absent"] for line in lines} == {"4 ranks need 4 GPUs, and here is 1"}
    assert lines[0]["params"]["collectives"] == "NCCL"


def test_ranks_are_an_option_of_the_command(capsys):
    asked = []

    def run(results, *, device, minutes, ranks=None):
        asked.append((ranks, minutes))

    assert command(run, "distributed", "", 2.0, ["--device", "cpu", "--ranks", "3"]) == 0
    assert asked == [(3, 2.0)]
