"""Predictions from known costs to the last digit, and advice from known rates."""

import dataclasses
import json

import pytest

from fastsiam.config import load_config
from fastsiam.config.budget import parse_budget
from fastsiam.data import rng
from fastsiam.data.bottleneck import Loading
from fastsiam.data.sources.open import open_source
from fastsiam.plan.advice import limit_of, tips, together
from fastsiam.plan.loaders import sample_of
from fastsiam.plan.predict import Costs, Schedule, run_of, run_of_budget, run_of_config
from fastsiam.plan.results import BatchRate, EndToEnd, LoaderRate, Measured, Rate, Saving, Stages
from fastsiam.plan.steps import Affordable, Probe, largest_affordable, other_batch_sizes
from fastsiam.plan.text import Plan, spoken

# 1,000 images in steps of 100: 10 an epoch, each a second.
SCHEDULE = Schedule(images=1050, batch_size=100, knn_every_epochs=5, save_every_seconds=60.0)
COSTS = Costs(image=0.01, start=7.0, compile=20.0, knn=3.0, collapse=0.5, save=0.25, watts=500.0)
LOADING = Loading("dali", 16, 16, True, False, 256, 10**12, 10**10)


def budget(text, price=None):
    return parse_budget(text, price)


def rates(median, spread=0.01):
    return Rate((median * (1 - spread), median, median * (1 + spread)))


def measured(step=1000.0, loader=2000.0, training=None, **changes):
    """On a GPU, one process, batch 512."""
    training = training or min(step, loader)
    found = Measured(
        images=1_281_167,
        val_images=50_000,
        ranks=1,
        measured_batch_size=512,
        shares_cores=False,
        device="cuda",
        gpu="NVIDIA H100",
        dtype="bf16",
        compiles=True,
        backend="dali",
        loader_text="dali 2.0",
        start_seconds=30.0,
        compile_seconds=60.0,
        end_to_end=EndToEnd(rates(training), 0.0, 0.2, 0.0, 0.5),
        step=rates(step),
        loaders=(LoaderRate("dali", rates(loader)),),
        batch_sizes=(BatchRate(512, 0.1, rates(step)),),
        stages=Stages(1 / 9000, 1 / loader, 1 / 8000, 1 / step, None),
        knn_seconds=120.0,
        collapse_seconds=0.1,
        saving=Saving(300_000_000, 2.0),
        energy="NVML total energy",
        notes=(),
        seconds=60.0,
    )
    return dataclasses.replace(found, **changes)


def test_a_run_is_the_sum_of_its_parts():
    """100 steps: kNN after epochs 5 and 10, collapse every 25, a save a minute and two at the end."""
    run = run_of(SCHEDULE, COSTS, 100)
    assert (run.epochs, run.knn_times, run.collapse_times, run.save_times) == (10, 2, 4, 3)
    assert run.train == pytest.approx(100.0)
    assert run.total == pytest.approx(7 + 20 + 100 + 2 * 3 + 4 * 0.5 + 3 * 0.25)
    assert run.joules == pytest.approx(500 * run.total)
    assert run.cost(3.6) == pytest.approx(run.total / 1000)
    assert run.cost(None) is None


def test_knn_is_counted_as_a_run_takes_it():
    def times(steps, early=False, **changes):
        return run_of(dataclasses.replace(SCHEDULE, **changes), COSTS, steps, early=early).knn_times

    assert times(50) == 1
    assert times(70) == 2
    assert times(100, knn_every_epochs=None) == 1
    # Two before training.
    assert times(100, controls=True) == 4
    # In a budget of time one comes by a tenth of it, unless epoch 5 does.
    assert times(100, early=True) == 3
    assert times(600, early=True) == 12
    assert run_of(SCHEDULE, dataclasses.replace(COSTS, knn=None), 100).knn_times == 0
    # The untrained encoder's batch-norm statistics see 25 batches.
    assert run_of(dataclasses.replace(SCHEDULE, controls=True), COSTS, 100).train == pytest.approx(125.0)


def test_each_kind_of_budget_buys_its_epochs():
    def steps(text, price=None, costs=COSTS):
        return run_of_budget(SCHEDULE, costs, budget(text, price)).steps

    assert steps("5k images") == 50
    assert steps("5.05k images") == 50
    # Collapse measures after 25, 50, ..., kNN after 50, 100, the early one, and the last.
    seconds = steps("200s")
    assert run_of(SCHEDULE, COSTS, seconds, early=True).total <= 200
    assert run_of(SCHEDULE, COSTS, seconds + 1, early=True).total > 200
    assert seconds == 153
    assert steps("0.2USD", price=3.6) == seconds
    # 100 kJ at 500 W.
    assert steps(f"{100 / 3600}kWh") == seconds
    assert steps("10s") == 0
    assert run_of_budget(SCHEDULE, dataclasses.replace(COSTS, watts=None), budget("1kWh")) is None


def test_a_configs_own_run_ends_at_its_max_steps():
    schedule = Schedule.of(load_config("r50_100ep", ["train.max_steps=70"]), 1_281_167)
    assert (schedule.steps_per_epoch, schedule.images_per_epoch) == (2502, 1_281_024)
    epochs = load_config("r50_100ep").to_spend
    assert run_of_config(schedule, COSTS, epochs).steps == 70
    assert run_of_config(dataclasses.replace(schedule, max_steps=None), COSTS, epochs).steps == 250_200
    short = load_config("r50_100ep", ["budget=2h", "train.max_steps=70"])
    assert run_of_config(Schedule.of(short, 1_281_167), COSTS, short.to_spend).steps == 70


def test_loader_and_step_share_a_cpu_and_run_beside_a_gpu():
    assert together(300.0, 600.0, shares_cores=True) == pytest.approx(200.0)
    assert together(300.0, 600.0, shares_cores=False) == 300.0
    assert together(None, 600.0, shares_cores=True) == 600.0


@pytest.mark.parametrize(
    ("step", "loader", "stages", "shares_cores", "expected"),
    [
        (1000, 2000, {}, False, "step"),
        (1000, 600, {}, False, "decoding"),
        (1000, 600, {"disk": 1 / 500}, False, "disk"),
        (1000, 600, {"augmentation": 1 / 500}, False, "augmentation"),
        # Decoding on all cores is slower than the step, but the loader as a whole is not.
        (1000, 1100, {"decoding": 1 / 900}, False, "step"),
        (1000, 2000, {"step": 0.4 / 1000, "communication": 0.6 / 1000}, False, "communication"),
        (1000, 1200, {"decoding": 1 / 900}, True, "decoding"),
        (1000, 1200, {}, True, "step"),
    ],
)
def test_the_limit_is_the_slowest_stage_of_the_slower_side(step, loader, stages, shares_cores, expected):
    found = measured(step, loader, shares_cores=shares_cores)
    found = dataclasses.replace(found, stages=dataclasses.replace(found.stages, **stages))
    limit = limit_of(found)
    assert limit.stage == expected
    assert limit.share == pytest.approx(found.end_to_end.rate.median / together(loader, step, shares_cores))


def actions(found, loading=LOADING, overrides=()):
    config = load_config("r50_100ep", overrides)
    return [(tip.action, tip.gain and round(tip.gain, 3)) for tip in tips(config, found, loading, limit_of(found))]


def test_a_slow_loader_is_told_the_backends_that_were_faster():
    slow = EndToEnd(rates(400), wait_fraction=0.6, idle_cores=0.0, disk_cores=0.0, joules_per_image=None)
    loaders = (
        LoaderRate("pil", rates(400)),
        LoaderRate("dali", rates(800), settings="data.backend=dali"),
        LoaderRate("resident", rates(5000), settings="data.backend=resident data.store_size=256"),
        LoaderRate("ffcv", None, "reads .beton files"),
    )
    found = measured(1000, 400, end_to_end=slow, loaders=loaders, backend="pil")
    loading = dataclasses.replace(LOADING, backend="pil")
    # The step allows 1,000; what advises a run says data.backend=dali as well, once.
    assert actions(found, loading) == [
        ("set data.backend=resident data.store_size=256", 2.5),
        ("set data.backend=dali", 2.0),
    ]
    # Within the spread.
    close = dataclasses.replace(found, loaders=(LoaderRate("pil", rates(400, 0.2)), LoaderRate("dali", rates(450))))
    assert actions(close, loading) == [("set data.backend=dali", None)]
    idle = dataclasses.replace(slow, idle_cores=8.0)
    found = measured(1000, 400, end_to_end=idle)
    assert actions(found, dataclasses.replace(LOADING, workers=4)) == [("set data.workers=12 (now 4)", None)]


def test_a_slow_step_is_told_batch_size_compiler_and_views():
    batches = (BatchRate(256, 0.05, rates(900)), BatchRate(512, 0.1, rates(1000)), BatchRate(1024, 0.2, rates(1200)))
    found = actions(measured(batch_sizes=batches, compiles=False))
    assert found[0] == ("set train.batch_size=1024 (the learning rate becomes 0.2)", 1.2)
    assert ("set train.compile=on", None) in found
    assert ("set views.size=160 (another recipe than the paper's)", None) in found
    # A loader of 1,100 images/s leaves less of it, and one of 1,010 nothing worth a sentence.
    assert actions(measured(loader=1100, batch_sizes=batches))[0][1] == 1.1
    assert all("batch_size" not in action for action, _ in actions(measured(loader=1010, batch_sizes=batches)))
    assert all("compile" not in action for action, _ in actions(measured()))


def test_what_is_too_slow_or_too_large_for_a_cpu_is_measured_smaller():
    affordable = Affordable(Probe(seconds=0.1, bytes=1e9), seconds=10.0, memory=200 * 10**9)
    assert affordable.refusal(50) is None
    assert affordable.refusal(51).startswith("a step takes about 5 s")
    assert affordable.refusal(256) == "does not fit the memory: about 256 GB, and 200 GB are free"
    assert largest_affordable(512, 1, affordable) == (32, affordable.refusal(512))
    assert largest_affordable(48, 1, affordable) == (48, None)
    assert Affordable(None, 1.0, 0).refusal(4096) is None
    assert other_batch_sizes(512, 1500, 1) == [256, 1024]
    assert other_batch_sizes(4, 100, 2) == [8, 16]


def test_a_sample_is_of_the_images_that_it_names(photos):
    source = open_source(str(photos))
    sample = sample_of(source, 3, seed=0)
    assert len(sample.source) == 16
    few = sample_of(dataclasses.replace(source, kinds=source.kinds.copy()), 3, seed=0)
    few.source.look(rng.probe_indices(0, 16, 4))
    for number, index in enumerate(sample.indices[:5].tolist()):
        assert sample.source.read(number) == source.read(index)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.44, "0.4 s"),
        (52.3, "52 s"),
        (59.7, "1 min"),
        (3599.6, "1 h"),
        (7175, "2 h"),
        (725, "12 min 5 s"),
        (40_800, "11 h 20 min"),
        (36_000, "10 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_times_are_said_as_people_say_them(seconds, expected):
    assert spoken(seconds) == expected


def test_the_answer_comes_first():
    config = load_config("r50_100ep", ["budget_price_per_hour=2"])
    plan = Plan.of(config, budget("8h"), measured(step=3000, loader=4000), LOADING)
    lines = plan.to_text().splitlines()
    # 128.1 million images at 3,000/s are 11 h 51 min; 10 kNN of 2 min; 501 collapse measures; 144 saves of 2 s.
    # Of the budget 8 kNN (one more to know their cost) and 93 saves take 19 min.
    assert lines[0] == "100 epochs take 12 h 19 min; the step is the limit; 8h buys 64.5 epochs."
    assert any(line.startswith("cost      24.63 at 2 an hour") for line in lines)
    answer = Plan.of(config, budget("10s"), measured(step=3000, loader=4000), LOADING).to_text().splitlines()[0]
    # Start 30 s, compilation 60, two kNN of 2 min, two saves of 2 s.
    assert answer.endswith("; 10s buys no step, for what is no training takes 5 min 34 s.")
    assert any("energy    18.5 kWh at 1,500 W, 0.5 J/image" in line for line in lines)
    assert any("the paper's Table 4 has 68.1 % for 100 epochs" in line for line in lines)
    assert any("the paper's Table 4 has no number below 100 epochs" in line for line in lines)
    without = measured(end_to_end=EndToEnd(rates(1000), 0, 0, 0, None), energy="not available (CPU device)")
    plan = Plan.of(load_config("r50_100ep", ["budget=1kWh"]), None, without, LOADING)
    assert plan.run is None
    assert json.loads(plan.to_json())["run"] == {
        "asked": "1kWh",
        "kind": "joules",
        "amount": 3.6e6,
        "steps": None,
    }
    assert plan.to_text().startswith("1kWh: energy is not available (CPU device), so nobody can say how far it goes")
