"""Rows of benchmarks.distributed are the same training where they exchange the same."""

import contextlib
import json
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import distributed as benchmark
from benchmarks.harness.results import Results
from benchmarks.harness.timing import Samples
from benchmarks.peers import AbsentError
from benchmarks.variants import gradient_reduction
from benchmarks.variants.gradient_reduction import build_product, build_step
from fastsiam.errors import UserError
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from tests.support.bench_configs import CPU, small_config
from tests.support.gloo_ranks import world

STEPS = 2


@contextlib.contextmanager
def cheap_compiler():
    """Graphs are traced and cut as ever, and run as they are; buckets are small enough for a small model."""
    torch._dynamo.reset()
    bucket_bytes, dist._DEFAULT_FIRST_BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, 20_000
    try:
        with (
            mock.patch.object(torch._inductor, "compile", lambda graph, inputs: graph),
            mock.patch.object(torch._dynamo, "lookup_backend", return_value=lambda graph, inputs: graph),
        ):
            yield
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = bucket_bytes


def runtime():
    return Runtime(world(), CPU, torch.float32, False, {})


def trained(config, way):
    """Returns the weights after a few steps of this rank, the gradients of every step, and the number of graphs."""
    with cheap_compiler():
        step = build_step(way, config, runtime(), benchmark.views_of_rank(config, runtime()))
        gradients = []
        for number in range(STEPS):
            step.run(number)
            gradients.append([parameter.grad.clone() for parameter in step.module.parameters()])
        return step.module.state_dict(), gradients, step.graphs()


@pytest.fixture(scope="module")
def rows(ranks):
    """Results of two ranks by row."""
    config = small_config(2)
    names = ("no communication", "fastsiam", "compiled in pieces", "gradients only")
    return {name: ranks(2, trained, config, benchmark.ROWS[name]) for name in names}


@pytest.mark.slow
def test_rows_that_exchange_the_same_are_the_same_training(rows):
    assert (rows["fastsiam"][0][2], rows["compiled in pieces"][0][2] > 1) == (0, True)
    for a, b in zip(rows["compiled in pieces"], rows["fastsiam"], strict=True):
        for key, value in a[0].items():
            torch.testing.assert_close(value, b[0][key], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=2e-5)
    apart = [rows[name][0][1][-1][0] for name in ("fastsiam", "gradients only", "no communication")]
    assert all((one - other).abs().max() > 1e-4 for one, other in pairwise([*apart, apart[0]]))


@pytest.mark.slow
def test_what_is_exchanged_shows_in_gradients_and_statistics(rows):
    for name, found in rows.items():
        way, ((first, gradients, _), (second, others, _)) = benchmark.ROWS[name], found
        averaged = all(torch.equal(a, b) for a, b in zip(gradients[0], others[0], strict=True))
        means = [key for key in first if key.endswith("running_mean")]
        shared = all(torch.allclose(first[key], second[key], atol=1e-6) for key in means)
        assert (averaged, shared) == (way.gradients, way.statistics == "all ranks"), name


def product_trained(config, way):
    with cheap_compiler(), contextlib.ExitStack() as stack:
        step = build_product(way, config, runtime(), stack)
        for number in range(STEPS):
            step.run(number)
        return {key: value.clone() for key, value in step.module.state_dict().items()}, step.graphs()


@pytest.mark.slow
def test_the_products_rows_are_runs_on_both_ranks(ranks):
    config = small_config(2)
    (eager, graphs), (second, _) = ranks(2, product_trained, config, benchmark.ROWS["fastsiam"])
    (compiled, graph), _ = ranks(2, product_trained, config, benchmark.ROWS["fastsiam, compiled"])
    assert (graphs, graph) == (0, 1)
    initial = gradient_reduction.build_method(config).state_dict()
    for key, value in eager.items():
        torch.testing.assert_close(value, second[key])
        torch.testing.assert_close(value, compiled[key], rtol=1e-4, atol=2e-5)
    assert any((value - initial[key]).abs().max() > 1e-3 for key, value in eager.items())


def measured(config, deadline):
    return benchmark.measure(world(), config, deadline)


@pytest.mark.slow
def test_lines_of_a_run_with_little_time(tmp_path, monkeypatch, ranks):
    path = tmp_path / "small.yaml"
    path.write_text(small_config(2).to_yaml())
    monkeypatch.setattr(benchmark, "SETTINGS", {"cpu": (str(path), 4)})
    monkeypatch.setattr(
        benchmark, "in_ranks", lambda size, _, measure, *arguments: ranks(size, measured, *arguments)[0]
    )
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
    method = gradient_reduction.build_method(small_config(2))
    return sum(parameter.numel() for parameter in method.parameters())


def test_shares_are_against_rows_that_are_compiled_alike():
    seconds = {
        "one process": 1.0, "one process, compiled": 0.5, "no communication": 2.0, "no communication, compiled": 0.8,
        "fastsiam": 4.0, "fastsiam, compiled": 1.0, benchmark.ALL_REDUCE: 0.1,
    }  # fmt: skip
    taken = {name: Samples((second,)) for name, second in seconds.items()}
    rows = SimpleNamespace(
        absent={"compiled in pieces": "why"}, world=World(0, 4, 0, 4), config=small_config(2), gradient_bytes=12,
        built=dict.fromkeys(seconds, gradient_reduction.Step(print)),
    )  # fmt: skip
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


def test_rows_that_cannot_run_are_absent(tmp_path, monkeypatch):
    two = Runtime(World(0, 2, 0, 2), CPU, torch.float32, False, {})
    with pytest.raises(AbsentError):
        build_step(benchmark.ROWS["nn.SyncBatchNorm"], small_config(), two, [])
    with pytest.raises(UserError) as caught:
        benchmark.run(Results(None, CPU), device=CPU, minutes=1, ranks=1)
    assert caught.value.code == "too-few-ranks"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(benchmark, "choose_precision", lambda *_: torch.bfloat16)
    benchmark.run(Results(tmp_path, CPU), device=torch.device("cuda"), minutes=1, ranks=4)
    lines = [json.loads(text) for text in (tmp_path / "distributed.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(benchmark.TABLE)
    assert all(line["absent"] for line in lines)
    assert lines[0]["params"]["collectives"] == "NCCL"
