"""benchmarks.methods: peers that compute our losses, what a step holds, a race of methods and its table."""

import json

import pytest
import torch

import fastsiam
from benchmarks import methods
from benchmarks.harness.results import Results
from benchmarks.peers import AbsentError, authors, copy_linear_layers, lightly
from benchmarks.race.contestants import Contestant, Loading
from benchmarks.race.methods import COMPONENTS, ENTRIES, Recipe, protocol
from benchmarks.race.timed_run import Outcome, Point, peak_of_a_step, run_job, thrown_away, try_loadings
from benchmarks.readme import by_component
from benchmarks.tables import TABLES, render
from benchmarks.time_to_accuracy import check_config, controls
from fastsiam.config import load_config
from fastsiam.errors import UserError
from tests.support.bench_configs import CPU, MACHINE

CONFIG = str(methods.CONFIG)
SMALL = ("model.width=8", "train.batch_size=8", "train.precision=fp32", "views.size=16")
QUICK = {"device": CPU, "minutes": 1.0, "minutes_each": 0.5, "seeds": 2, "rates": ("0.5x", "1x")}


def config_of(name, *more):
    return load_config(CONFIG, [*ENTRIES[name].overrides, *SMALL, *more])


def both(name, *more):
    """Our method and lightly's step with the same weights."""
    config = config_of(name, *more)
    torch.manual_seed(0)
    method = fastsiam.build_method(config)
    weights = {key: value.clone() for key, value in method.state_dict().items()}
    return method, lightly.build_step(config, weights, CPU)


def views_of(count, images=8):
    return torch.randn(count * images, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.needs("lightly")
@pytest.mark.parametrize(("name", "count"), [("simsiam", 2), ("fastsiam", 4)])
def test_lightlys_simsiam_is_ours(name, count):
    method, step = both(name)
    views = views_of(count)
    assert step(views).item() == pytest.approx(method([views])["loss"].item(), abs=1e-6)


@pytest.mark.needs("lightly")
def test_lightlys_byol_has_a_quarter_of_our_loss_and_a_target_that_follows_first():
    """Ours is 4 + 4 times theirs, for which its grid of rates begins at four times ours."""
    method, step = both("byol")
    views = views_of(2)
    theirs = step(views).item()
    assert 4 + 4 * theirs == pytest.approx(method([views])["loss"].item(), abs=1e-5)
    assert ENTRIES["byol"].of("lightly").rate == 4
    follower = step.model.follower
    before = [p.clone() for p in follower.parameters()]
    leaders = [p.clone() for p in (*step.model.encoder.parameters(), *step.model.projector.parameters())]
    step(views)
    for old, leader, new in zip(before, leaders, follower.parameters(), strict=True):
        torch.testing.assert_close(new, 0.99 * old + 0.01 * leader)
    assert max((old - leader).abs().max() for old, leader in zip(before, leaders, strict=True)) > 1e-6


@pytest.mark.needs("lightly")
def test_lightlys_moco_one_way_is_ours():
    """Of both directions theirs is the mean, and the second one sees the first one's keys in the queue."""
    method, step = both("moco", "method.symmetric=false", "method.queue=64")
    step.model.criterion.memory_bank.bank.copy_(method.queue)
    x_query, x_key = views_of(2).chunk(2)
    ours = method([torch.cat((x_query, x_key))])["loss"].item()
    assert step.model._one_way(x_query, x_key).item() == pytest.approx(ours, abs=1e-5)


@pytest.mark.needs("lightly")
def test_lightlys_swav_is_ours_but_for_a_bias_of_its_prototypes():
    method, step = both("swav")
    with torch.no_grad():
        step.model.prototypes.heads[0].bias.zero_()
    views = views_of(2)
    assert step(views).item() == pytest.approx(method([views])["loss"].item(), abs=1e-4)


@pytest.mark.needs("lightly")
def test_a_queue_outside_of_the_state_dict_is_thrown_away_too():
    _, step = both("moco", "method.queue=64")
    bank = step.model.criterion.memory_bank
    assert not [name for name in step.model.state_dict() if "bank" in name]
    before = bank.bank.clone()
    contestant = Contestant(step, lambda number: [views_of(2)] * 2, step.model, step.encoder, step.optimizer)
    with thrown_away(contestant):
        step(views_of(2))
        assert bank.bank_ptr.item() == 16
    assert torch.equal(bank.bank, before)
    assert bank.bank_ptr.item() == 0


def test_a_method_that_a_peer_has_not_is_absent():
    with pytest.raises(AbsentError, match="with two views alone"):
        authors.build_step(config_of("byol"), {}, CPU)
    with pytest.raises(AbsentError, match="with two views alone"):
        authors.build_loader([], groups=config_of("fastsiam").view_groups, batch_size=8, workers=0, device=CPU)


def test_linear_layers_are_copied_in_their_order():
    ours = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    own_bias = theirs[0].bias.clone()
    copy_linear_layers(theirs, ours.state_dict())
    assert torch.equal(theirs[0].weight, ours[0].weight)
    assert torch.equal(theirs[2].weight, ours[2].weight)
    assert torch.equal(theirs[2].bias, ours[2].bias)
    assert torch.equal(theirs[0].bias, own_bias)
    with pytest.raises(ValueError, match="zip"):
        copy_linear_layers(theirs[0], ours.state_dict())


def test_the_peak_of_a_step_holds_the_run_and_what_a_step_allocates():
    """By hand: weights and their momentum, a queue, and a block of 4,000 bytes."""
    model = torch.nn.Linear(10, 10, bias=False)
    model.register_buffer("queue", torch.zeros(50), persistent=False)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "scheduled": True}], lr=0.1, momentum=0.9)

    def step(views):
        optimizer.zero_grad(set_to_none=False)
        model(views).sum().backward()
        optimizer.step()
        _ = torch.ones(1000)

    contestant = Contestant(step, lambda number: [torch.ones(1, 10)], model, model, optimizer)
    before = model.weight.clone()
    assert peak_of_a_step(contestant, CPU) == pytest.approx(2 * 400 + 200 + 4000, abs=256)
    assert torch.equal(model.weight, before)


def test_a_contestant_hears_of_progress_before_its_step():
    config = config_of("moco")
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "scheduled": True}], lr=0.1)
    heard = []
    contestant = Contestant(
        lambda views: heard.append("step"), lambda number: [None], model, model, optimizer, before=heard.append
    )
    contestant.train_step(config, 0.25)
    assert heard == [0.25, "step"]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_method_and_its_peers_can_race(name):
    entry = ENTRIES[name]
    config = load_config(CONFIG, entry.overrides)
    check_config(config)
    assert config.method.name == ("simsiam" if name == "fastsiam" else name)
    # One size for everyone.
    assert len(config.view_stages) == 1
    for variant in methods.DEFAULT:
        recipe = entry.of(variant)
        theirs = load_config(CONFIG, [*entry.overrides, *recipe.overrides])
        assert theirs.view_groups == config.view_groups
        assert theirs.model == config.model
    assert entry.of("fastsiam") == Recipe()
    # Our words for the components follow from the config.
    assert ("predictor" in entry.components) == (getattr(config.method, "predictor", None) is not None)
    assert ("momentum_encoder" in entry.components) == hasattr(config.method, "momentum")
    assert ("clustering" in entry.components) == hasattr(config.method, "prototypes")


def test_protocols_in_a_line():
    config = load_config(CONFIG, ENTRIES["moco"].overrides)
    found = protocol("solo-learn DALI", config)
    assert found == "heads 256-128, T 0.1, queue 4096, tau 0.99..0.999, wd 0.0005, sgd"
    assert "tau 0.99," in protocol("fastsiam", config)
    assert "tau 0.99..1," in protocol("fastsiam", load_config(CONFIG, ENTRIES["byol"].overrides))


class Played:
    """In place of processes: outcomes by contestant; what was asked for, in order."""

    def __init__(self):
        self.asked = []

    def __call__(self, function, job):
        if function is controls:
            return {"untrained_knn": 30.0, "raw_pixels_knn": 25.0}
        method = job.config.method
        if job.variant == "lightly" and method.name == "swav":
            raise AbsentError("no swav")
        if function is try_loadings:
            return {Loading("PIL", 0): 5.0}
        assert function is run_job
        rate, seed = job.config.optimizer.base_lr, job.config.train.seed
        self.asked.append((method.name, job.variant, seed, rate, getattr(method, "temperature", None)))
        curve = tuple(Point(15.0 * n, 100 * n, 40.0 + n + rate) for n in (1, 2))
        facts = {"precision": "fp32", "memory_format": "contiguous", "compiled": False, "loader": "a loader"}
        return Outcome(curve, 1.0, 1.0, 2.0, 3 << 20, facts)


@pytest.fixture
def race(tmp_path, demo_folder):
    def start(*names):
        played = Played()
        options = {"method": names, "contestants": ("fastsiam", "lightly"), "call": played, "data": demo_folder}
        methods.run(Results(tmp_path / "out", CPU), **QUICK, **options)
        text = (tmp_path / "out/methods.jsonl").read_text()
        return played.asked, [json.loads(line) for line in text.splitlines()]

    return start


def test_each_method_has_its_race_and_peers_their_numbers(race, capsys):
    asked, lines = race("moco", "simclr", "swav")
    rate = {name: load_config(CONFIG, ENTRIES[name].overrides).optimizer.base_lr for name in ENTRIES}
    assert [one[:4] for one in asked if one[0] == "moco"] == [
        ("moco", "fastsiam", 0, rate["moco"]), ("moco", "lightly", 0, rate["moco"]),
        ("moco", "lightly", 0, 2 * rate["moco"]), ("moco", "fastsiam", 1, rate["moco"]),
        ("moco", "lightly", 1, 2 * rate["moco"]),
    ]  # fmt: skip
    assert {one[1]: one[4] for one in asked if one[0] == "simclr"} == {"fastsiam": 0.2, "lightly": 0.5}
    runs = [line for line in lines if line["kind"] == "run"]
    assert {line["params"]["method"] for line in runs} == {"moco", "simclr", "swav"}
    assert {line["peak_memory_bytes"] for line in runs} == {3 << 20}
    assert all(line["protocol"].startswith("heads 256-") for line in runs)
    assert [line["variant"] for line in lines if line["kind"] == "absent"] == ["lightly"]
    assert "moco lightly: kNN 42.40 ± 0.00 % (n = 2)" in capsys.readouterr().out
    # It goes on where it was stopped.
    assert race("moco", "simclr")[0] == []


def test_unknown_methods_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--method: 'dino' is unknown; write some of simsiam, fastsiam, byol"):
        methods.run(Results(tmp_path, CPU), **QUICK, method=("dino",))


def test_the_table_has_components_memory_and_protocol():
    lines = []
    for name, variant, knn, memory in (("byol", "fastsiam", 50.0, 40), ("byol", "lightly", 45.0, 80)):
        params = {"method": name, "data": "cifar10", "seed": 0, "base_lr": 0.1}
        lines.append({
            "schema": 1, "benchmark": "methods", "variant": variant, "kind": "run", "params": params,
            "samples_seconds": [], "environment": MACHINE, "knn": knn, "seconds": 30.0,
            "images_per_second": 500.0 if variant == "fastsiam" else 400.0, "curve": [[30.0, 15000, knn]],
            "target": 40.0, "precision": "fp32", "memory_format": "contiguous",
            "loader": "PIL", "peak_memory_bytes": memory << 20, "protocol": "heads 256-256, tau 0.99",
        })  # fmt: skip
    params = {"method": "swav", "data": "cifar10"}
    lines.append({**lines[-1], "kind": "absent", "variant": "authors", "params": params, "absent": "no swav"})
    text = render(TABLES["methods"], lines)
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert header == (
        "| method | variant | negatives | momentum encoder | predictor | stop gradient | clustering | kNN, % "
        "| images/s | peak MiB | best base_lr | protocol | precision | against lightly |"
    )
    assert rows[0].startswith("| byol | fastsiam | no | yes | yes | yes | no | 50.0 | 500 | 40.0 | 0.1 of 0.1 | heads")
    assert rows[1].startswith("| byol | lightly | no | yes | yes | yes | no | 45.0 | 400 | 80.0 |")
    assert [row.split("|")[-2].strip() for row in rows] == ["1.25x", "1.00x", "absent"]
    assert "target" not in text
    assert "authors is absent: no swav" in text
    assert set(COMPONENTS) == {name for entry in ENTRIES.values() for name in entry.components}
    page = by_component.text({"methods": [lines]})
    assert page.splitlines()[-1] == (
        "| BYOL |  | yes | yes | by the target |  | 50.0 / 45.0 / - | 500 / 400 / - | 40.0 / 80.0 / - |"
    )
    assert "protocol" not in page
    assert by_component.text({}) == "No race of methods has been recorded yet."
