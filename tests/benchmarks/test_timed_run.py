"""One run of a race: a fair clock, a warm-up that leaves no trace, peers that begin where we begin."""

import contextlib
import copy
import importlib.util
import itertools
import math
import random

import numpy as np
import pytest
import torch

from benchmarks.race.contestants import PEERS, Contestant, Loading, Peer, Product, overrides_of, seed_everything
from benchmarks.race.timed_run import Clock, Job, Point, against_the_clock, controls, try_loadings, warm_up
from fastsiam.data.sources.open import open_source

CPU = torch.device("cpu")
INSTALLED = ["authors", *(["lightly"] if importlib.util.find_spec("lightly") else [])]


@pytest.fixture
def build():
    """Returns a function that builds a contestant, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def make(variant, config):
            if variant == "fastsiam":
                contestant = Product(config)
            else:
                source = open_source(config.data.train)
                contestant = PEERS[variant].build(config, source, CPU, None, Loading("PIL", 0))
            stack.callback(contestant.close)
            return contestant

        yield make


def bits(contestant):
    """Everything that training moves."""
    optimizer = contestant.optimizer.state_dict()
    buffers = [value for state in optimizer["state"].values() for value in state.values()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    return copy.deepcopy((contestant.model.state_dict(), buffers, optimizer["param_groups"], generators))


@pytest.mark.parametrize("variant", ["fastsiam", "authors"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_warm_up_leaves_every_bit_as_it_was(build, tiny_config, variant, steps_before):
    contestant = build(variant, tiny_config())
    step = contestant.step

    def drawing(views):
        """Draws from every generator that a peer may use."""
        random.random(), np.random.random(), torch.rand(1)
        return step(views)

    contestant.step = drawing
    batches = contestant.batches()
    for _ in range(steps_before):
        contestant.step(next(batches))
    batches.close()
    before = bits(contestant)
    assert warm_up(contestant, tiny_config()) > 0
    after = bits(contestant)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    # Ours has its momentum, of zeros, before the first step.
    has_momentum = steps_before > 0 or variant == "fastsiam"
    assert len(before[1]) == len(after[1]) == has_momentum * len(list(contestant.model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]
    assert before[3][:2] == after[3][:2]
    assert torch.equal(before[3][2], after[3][2])
    assert all(parameter.grad is None for parameter in contestant.model.parameters())


def test_a_warmed_up_run_trains_as_one_that_is_not(build, tiny_config):
    """The authors' loader draws from the global generators, which are put back too."""
    losses = {}
    for warm in (False, True):
        contestant = build("authors", tiny_config())
        seed_everything(5)
        if warm:
            warm_up(contestant, tiny_config())
        losses[warm] = [contestant.step(views).item() for views in itertools.islice(contestant.batches(), 4)]
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == 4


def test_every_size_of_views_is_warmed_up_before_the_clock(build, tiny_config):
    """Each would compile on the clock otherwise; afterwards the size follows progress."""
    config = tiny_config("views.size=24..32")
    contestant = build("fastsiam", config)
    step, sizes = contestant.step, []

    def seen(views):
        sizes.append(views.shape[-1])
        return step(views)

    contestant.step = seen
    warm_up(contestant, config, steps=2)
    assert sizes == [24, 24, 32, 32]
    contestant.train_step(config, 0.0)
    assert contestant.run.parts.data.sizes == (24,)


def test_the_products_schedule_follows_the_clock_of_the_race(build, tiny_config):
    config = tiny_config("optimizer.warmup=0", "views.size=8..16")
    contestant, found = build("fastsiam", config), []
    epoch = contestant.run.parts.data.steps_per_epoch
    for number in range(3 * epoch):
        contestant.train_step(config, min(number / epoch / 2, 1.0))
        found.append((contestant.optimizer.param_groups[0]["lr"], contestant.run.parts.data.sizes))
    expected = [config.learning_rate * (1 + math.cos(math.pi * min(n / epoch / 2, 1))) / 2 for n in range(3 * epoch)]
    assert [rate for rate, _ in found] == pytest.approx(expected, abs=1e-6 * config.learning_rate)
    # The full size is due after four fifths of the time, in the second epoch, and the time is that of two.
    small = math.ceil(0.8 * 2 * epoch)
    assert [sizes for _, sizes in found] == [(8,)] * small + [(16,)] * (3 * epoch - small)
    assert contestant.run.parts.progress.state.step == 3 * epoch
    assert math.isfinite(contestant.loss())


def test_controls_see_views_of_the_full_size(tiny_config):
    """Views that grow begin small, and batch-norm statistics of those are not what is evaluated."""
    assert controls(tiny_config("views.size=8..16")) == controls(tiny_config())


class Paced(Contestant):
    """Contestant whose step takes `pace` seconds of a clock that it moves itself."""

    def __init__(self, pace, config):
        self.time, self.pace, self.rates = 0.0, pace, []
        model = torch.nn.Linear(1, 1)
        groups = [{"params": list(model.parameters()), "scheduled": True}]
        optimizer = torch.optim.SGD(groups, lr=config.learning_rate)
        super().__init__(self.paced_step, lambda number: [None], model, model, optimizer)

    def now(self):
        return self.time

    def paced_step(self, _views):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.time += self.pace
        return torch.tensor(-0.5)


def paced(pace, config, seconds=8.0, evaluations=4):
    contestant, accuracies = Paced(pace, config), itertools.count(40)

    def evaluate():
        contestant.time += 1000
        return float(next(accuracies))

    clock = Clock(CPU, contestant.now)
    curve, loss = against_the_clock(contestant, config, seconds, evaluations, evaluate, clock, lambda text: None)
    assert loss == -0.5
    return contestant, curve


def test_the_clock_stands_while_evaluating(tiny_config):
    contestant, curve = paced(1.0, tiny_config())
    assert contestant.time == 8 + 4 * 1000
    assert curve == (Point(2, 16, 40), Point(4, 32, 41), Point(6, 48, 42), Point(8, 64, 43))


def test_evaluations_come_after_the_step_that_passes_their_share(tiny_config):
    _, curve = paced(1.5, tiny_config())
    assert [point.seconds for point in curve] == [3, 4.5, 6, 9]
    # A step of five seconds passes two shares at once: curves of a race are of one length.
    _, curve = paced(5.0, tiny_config())
    assert [(point.seconds, point.knn) for point in curve] == [(5, 40), (5, 40), (10, 41), (10, 41)]


@pytest.mark.parametrize("pace", [1.0, 0.01])
def test_everyone_anneals_to_zero_in_the_same_time(tiny_config, pace):
    config = tiny_config("optimizer.warmup=0")
    contestant, _ = paced(pace, config)
    steps = round(8 / pace)
    assert len(contestant.rates) == steps
    expected = [config.learning_rate * (1 + math.cos(math.pi * number / steps)) / 2 for number in range(steps)]
    assert contestant.rates == pytest.approx(expected, abs=1e-9)
    assert contestant.rates[-1] == pytest.approx(config.learning_rate * (math.pi / steps) ** 2 / 4, rel=0.02)


@pytest.mark.parametrize("variant", INSTALLED)
def test_peers_begin_with_our_weights_and_our_loss(build, tiny_config, variant):
    """Seed by seed, on the CIFAR ResNet that torchvision lacks; what their optimizers hold is all of the model."""
    stems = []
    for seed in (0, 1):
        config = tiny_config(f"train.seed={seed}")
        ours, theirs = build("fastsiam", config), build(variant, config)
        weights = ours.encoder.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in theirs.encoder.state_dict().items())
        counts = [sum(p.numel() for g in c.optimizer.param_groups for p in g["params"]) for c in (ours, theirs)]
        assert counts[0] == counts[1] == sum(p.numel() for p in ours.model.parameters())
        views = next(ours.batches())
        stems.append(weights["conv1.weight"].clone())
        for tolerance in (1e-5, 1e-4):
            assert ours.step(views).item() == pytest.approx(theirs.step(views).item(), abs=tolerance)
    assert (stems[0] - stems[1]).abs().mean() > 0.05


def test_whose_predictor_keeps_its_rate(build, tiny_config):
    scheduled = {}
    for variant in ("fastsiam", *INSTALLED):
        contestant = build(variant, tiny_config())
        scheduled[variant] = [group["scheduled"] for group in contestant.optimizer.param_groups]
    expected = {"fastsiam": [True, False], "authors": [True, False], "lightly": [True]}
    assert scheduled == {name: expected[name] for name in ("fastsiam", *INSTALLED)}


def test_peers_see_the_configs_views(build, tiny_config):
    """Without jitter, grey and flip, and with crops of the whole image: both views are the resized image."""
    plain = [f"views.{key}=0.0" for key in ("jitter", "grayscale", "flip")]
    config = tiny_config("views.size=48", "views.crop_scale=[1.0, 1.0]", *plain)
    expected = next(build("fastsiam", config).batches())
    for variant in INSTALLED:
        views = next(build(variant, config).batches())
        first, second = views.chunk(2)
        assert torch.equal(first, second)
        # The same channel statistics: the demo images' mean is at zero after them.
        assert abs(views.mean() - expected.mean()) < 0.15
        assert abs(views.std() - expected.std()) < 0.15


def test_a_trial_keeps_the_better_of_two_turns(tiny_config, monkeypatch):
    monkeypatch.setattr(Peer, "candidates", lambda self: [Loading("PIL", 0), Loading("PIL", 1)])
    rates = iter([10.0, 30.0, 20.0, 5.0])
    monkeypatch.setattr("benchmarks.race.timed_run._rate", lambda *_: next(rates))
    job = Job("authors", tiny_config(), 1.0, 2)
    assert try_loadings(job) == {Loading("PIL", 0): 20.0, Loading("PIL", 1): 30.0}


def test_variations_of_ours_have_four_views_or_views_that_grow(tiny_config):
    config = tiny_config("views.size=8..16", "views.count=4")
    assert overrides_of("fastsiam", config) == overrides_of("authors", config) == []
    found = {}
    for name in ("fastsiam + 4 views", "fastsiam + growing views", "fastsiam plain"):
        (views,) = tiny_config("views.size=8..16", "views.count=4", *overrides_of(name, config)).views
        found[name] = views.count, views.sizes
    assert found == {
        "fastsiam + 4 views": (4, (16,)), "fastsiam + growing views": (2, (8, 16)), "fastsiam plain": (2, (16,)),
    }  # fmt: skip
