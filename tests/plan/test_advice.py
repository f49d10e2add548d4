"""Limits and advice from known rates."""

import dataclasses

import pytest

from fastsiam.config import load_config
from fastsiam.plan.advice import limit_of, tips, together
from fastsiam.plan.results import BatchRate, LoaderRate
from tests.support.plans import LOADING, measured, rates


def test_loader_and_step_share_a_cpu_and_run_beside_a_gpu():
    assert together(300.0, 600.0, shares_cores=True) == pytest.approx(200.0)
    assert together(300.0, 600.0, shares_cores=False) == 300.0
    assert together(None, 600.0, shares_cores=True) == 600.0


@pytest.mark.parametrize(
    ("step", "loader", "stages", "device", "expected"),
    [
        (1000, 2000, {}, "cuda", "step"),
        (1000, 600, {}, "cuda", "decoding"),
        (1000, 600, {"disk": 1 / 500}, "cuda", "disk"),
        (1000, 600, {"augmentation": 1 / 500}, "cuda", "augmentation"),
        # Decoding on all cores is slower than the step, but the loader as a whole is not.
        (1000, 1100, {"decoding": 1 / 900}, "cuda", "step"),
        (1000, 2000, {"step": 0.4 / 1000, "communication": 0.6 / 1000}, "cuda", "communication"),
        (1000, 1200, {"decoding": 1 / 900}, "cpu", "decoding"),
        (1000, 1200, {}, "cpu", "step"),
    ],
)
def test_the_limit_is_the_slowest_stage_of_the_slower_side(step, loader, stages, device, expected):
    found = measured(step, loader, device=device)
    limit = limit_of(dataclasses.replace(found, seconds_per_image=found.seconds_per_image | stages))
    assert limit.stage == expected
    assert limit.share == pytest.approx(min(step, loader) / together(loader, step, device == "cpu"))


def advice(found, loading=LOADING):
    return tips(load_config("r50_100ep"), found, loading, limit_of(found))


def gains(found, loading=LOADING):
    return [(tip.code, tip.gain and round(tip.gain, 3)) for tip in advice(found, loading)]


def test_a_slow_loader_is_advised_the_backends_that_were_faster():
    loaders = (
        LoaderRate("pil", rates(400)),
        LoaderRate("dali", rates(800), settings="data.backend=dali"),
        LoaderRate("resident", rates(5000), settings="data.backend=resident data.store_size=256"),
        LoaderRate("ffcv", None, "reads .beton files"),
    )
    found = measured(1000, 400, wait_fraction=0.6, idle_cores=0.0, loaders=loaders, backend="pil")
    loading = dataclasses.replace(LOADING, backend="pil")
    # The step allows 1,000; a run would be advised data.backend=dali as well, which is said once.
    assert gains(found, loading) == [("faster-loader", 2.5), ("faster-loader", 2.0)]
    assert "data.backend=resident data.store_size=256" in advice(found, loading)[0].action
    # Within the spread.
    close = dataclasses.replace(found, loaders=(LoaderRate("pil", rates(400, 0.2)), LoaderRate("dali", rates(450))))
    assert gains(close, loading) == [("slow-loader", None)]
    idle = measured(1000, 400, wait_fraction=0.6, idle_cores=8.0)
    assert "data.workers=12" in advice(idle, dataclasses.replace(LOADING, workers=4))[0].action


def test_a_slow_step_is_advised_batch_size_compiler_and_views():
    batches = (BatchRate(256, 0.05, rates(900)), BatchRate(512, 0.1, rates(1000)), BatchRate(1024, 0.2, rates(1200)))
    found = measured(batch_sizes=batches, compile=False)
    assert gains(found) == [("batch-size", 1.2), ("compile", None), ("smaller-views", None), ("faster-gpu", None)]
    assert "train.batch_size=1024" in advice(found)[0].action
    assert "views.size=160" in advice(found)[2].action
    # A loader of 1,100 images/s leaves less of it, and one of 1,010 nothing worth a sentence.
    assert gains(measured(loader=1100, batch_sizes=batches))[0] == ("batch-size", 1.1)
    codes = [code for code, _ in gains(measured(loader=1010, batch_sizes=batches))]
    assert codes == ["smaller-views", "faster-gpu"]
