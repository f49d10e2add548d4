"""The printed plan, in numbers."""

import json

from fastsiam.config import load_config
from fastsiam.config.budget import parse_budget
from fastsiam.plan.predict import plan_of
from fastsiam.plan.text import spoken, text_of
from tests.support.plans import LOADING, measured


def test_durations_have_two_units_at_most():
    known = {0.44: "0.4 s", 52.3: "52 s", 59.7: "1 min", 3599.6: "1 h", 725: "12 min 5 s", 40_800: "11 h 20 min"}
    assert {seconds: spoken(seconds) for seconds in known} == known
    assert spoken(273_600) == "3 d 4 h"


def test_the_answer_comes_first():
    config, found = load_config("r50_100ep", ["budget_price_per_hour=2"]), measured(step=3000, loader=4000)
    text = text_of(plan_of(config, parse_budget("8h"), found, LOADING), config)
    # 128.1 million images at 3,000/s are 11 h 51 min; 10 kNN of 2 min; 501 collapse measures; 144 saves of 2 s.
    # Of the budget 8 kNN (one more to know their cost) and 93 saves take 19 min.
    assert [part in text.splitlines()[0] for part in ("100 epochs", "12 h 19 min", "64.5 epochs")] == [True] * 3
    assert "\ncost      24.63 at 2 an hour\n" in text
    assert "\nenergy    18.5 kWh at 1,500 W, 0.5 J/image\n" in text
    assert "68.1 % at 100 epochs" in text
    # Start 30 s, compilation 60, two kNN of 2 min, two saves of 2 s.
    nothing = text_of(plan_of(config, parse_budget("10s"), found, LOADING), config)
    assert "5 min 34 s" in nothing.splitlines()[0]


def test_energy_that_is_not_measured_buys_an_unknown_number_of_steps():
    config = load_config("r50_100ep", ["budget=1kWh"])
    plan = plan_of(config, None, measured(joules_per_image=None), LOADING)
    run = json.loads(plan.to_json())["run"]
    assert (run["asked"], run["kind"], run["amount"], run["steps"]) == ("1kWh", "joules", 3.6e6, None)
    assert text_of(plan, config).startswith("1kWh cannot be predicted")


def test_a_step_is_named_with_its_method_and_all_of_its_views():
    def step_of(name, *overrides):
        config = load_config(name, overrides)
        text = text_of(plan_of(config, None, measured(), LOADING), config)
        return next(line for line in text.splitlines() if line.startswith("step   ")), text

    line, text = step_of("r50_100ep_swav_b4096")
    assert line == "step      swav, resnet50, 2 x 224 px + 6 x 96 px, batch 4096, bf16, compile on"
    assert "worth     SwAV's README: 72.1 % at 100 epochs; ImageNet linear top-1, batch 4096, multi-crop" in text
    assert "simsiam, resnet50, 4 x 224 px, batch" in step_of("r50_100ep_fastsiam")[0]
    assert "2 x 224 px (faster while 128..224 px grow), batch" in step_of("r50_100ep", "views.size=128..224")[0]
