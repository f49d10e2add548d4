"""benchmarks.time_to_accuracy: a race that goes on where it was stopped, and its standings, table and plot."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import time_to_accuracy
from benchmarks.harness.results import Results
from benchmarks.peers import AbsentError
from benchmarks.race.contestants import Loading, Peer
from benchmarks.race.plot import draw, mean_curve
from benchmarks.race.standings import Lines, best_rate, read, seconds_to, standings
from benchmarks.race.subset import write_list
from benchmarks.race.timed_run import Outcome, Point, run_job, try_loadings
from benchmarks.tables import TABLES, render
from benchmarks.time_to_accuracy import EVALUATIONS, check_config, in_words, run
from fastsiam.config import load_config
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from fastsiam.runtime import malloc
from tests.support.bench_configs import MACHINE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def memory():
    """Ours keeps freed memory, as a session does until its end."""
    yield
    malloc.give_back_freed()


class Played:
    """In place of processes: outcomes by contestant, seed and rate; what was asked for, in order."""

    def __init__(self, knn):
        self.knn, self.asked = knn, []

    def __call__(self, function, job):
        if function is time_to_accuracy.controls:
            return {"untrained_knn": 30.0, "raw_pixels_knn": 25.0}
        if job.variant == "lightly":
            raise AbsentError("pip install lightly")
        if function is try_loadings:
            self.asked.append(("trial", job.variant))
            return {Loading("PIL", 0): 5.0, Loading("PIL", 2): 9.0}
        assert function is run_job
        assert job.loading == (None if job.variant == "fastsiam" else Loading("PIL", 2))
        config = job.config
        self.asked.append((job.variant, config.train.seed, config.optimizer.base_lr))
        knn = self.knn(*self.asked[-1])
        curve = tuple(Point(3.0 * n, 100 * n, knn - job.evaluations + n) for n in range(1, job.evaluations + 1))
        facts = {"precision": "fp32", "memory_format": "contiguous", "compiled": False, "loader": "a loader"}
        return Outcome(curve, -0.5, 1.0, 2.0, 3 << 20, facts)


@pytest.fixture
def race(tmp_path, tiny, monkeypatch):
    """A function that runs a played race on the tiny quickstart, and gives what was asked for and the lines."""
    monkeypatch.setattr(time_to_accuracy.plot, "draw", lambda *_: [])
    path = tmp_path / "tiny.yaml"
    path.write_text(load_config("quickstart", tiny("optimizer.base_lr=0.4", "train.seed=7")).to_yaml())

    def start(knn=lambda variant, seed, rate: 40.0, **options):
        played = Played(knn)
        numbers = {"device": CPU, "minutes": 1.0, "config": str(path), "minutes_each": 0.5, "seeds": 2, "target": 41.0}
        numbers["contestants"] = ("fastsiam", "authors", "lightly")
        run(Results(tmp_path / "out", CPU), call=played, **numbers | options)
        return played.asked, read(tmp_path / "out/time_to_accuracy.jsonl")

    return start


def test_the_grid_finds_the_best_rate_and_seeds_take_turns(race, tmp_path, capsys):
    """Seven runs: the grid of the authors and our one rate with the first seed, the best with the second."""
    asked, lines = race(lambda variant, seed, rate: 42.0 if variant == "fastsiam" else 40.0 - abs(rate - 0.8) + seed)
    assert asked == [
        ("fastsiam", 7, 0.4), ("trial", "authors"), ("authors", 7, 0.2), ("authors", 7, 0.4), ("authors", 7, 0.8),
        ("fastsiam", 8, 0.4), ("authors", 8, 0.8),
    ]  # fmt: skip
    kinds = [line["kind"] for line in lines]
    assert {kind: kinds.count(kind) for kind in kinds} == {"control": 1, "run": 6, "trial": 1, "absent": 1}
    found = {entry["contestant"]: entry for entry in json.loads((tmp_path / "out/standings.json").read_text())}
    assert found["fastsiam"]["knn_mean"] == 42
    assert found["fastsiam"]["seconds_to_target"] == [6.0, 6.0]
    assert found["authors"]["base_lr_tried"] == [0.2, 0.4, 0.8]
    assert (found["authors"]["knn_mean"], found["authors"]["knn_std"]) == pytest.approx((47.5, 0.5**0.5))
    printed = capsys.readouterr().out
    assert "run 1 of 10: fastsiam, seed 7, base_lr 0.4" in printed
    assert "absent: pip install lightly" in printed
    assert "fastsiam: kNN 42.00 ± 0.00 % (n = 2) at base_lr 0.4; 41 % reached by 2 of 2, in 6 ± 0 s" in printed


def test_a_race_goes_on_where_it_was_stopped(race, tmp_path):
    asked, lines = race()
    path = tmp_path / "out/time_to_accuracy.jsonl"
    assert race()[0] == []
    # Killed while the last line was being written.
    path.write_bytes(path.read_bytes()[:-30])
    again, lines_again = race()
    assert again == asked[-1:]
    assert [line["params"] for line in lines_again] == [line["params"] for line in lines]
    # More seeds: what is there counts. Another target: no run depends on it. Another length: another race.
    more, _ = race(seeds=3)
    assert more == [("fastsiam", 9, 0.4), ("authors", 9, 0.2)]
    assert race(seeds=3, target=10.0)[0] == []
    assert len(race(minutes_each=1.0)[0]) == len(asked)


def test_as_many_evaluations_as_asked_for_and_10_s_fit(race):
    def lengths(**options):
        _, lines = race(minutes_each=1.0, contestants=("fastsiam",), **options)
        return {len(line["curve"]) for line in lines if line["kind"] == "run"}

    assert lengths(evaluations=4) == {4}
    assert lengths(evaluations=4) | lengths(evaluations=50) == {4, 6}


def test_numbers_of_standings():
    """Three runs by hand; one that misses the target leaves the mean time open."""
    curves = [[(10, 100, 30.0), (20, 200, 44.9), (30, 300, 45.0)], [(11, 90, 45.5), (21, 180, 44), (31, 270, 48)]]
    lines = [run_line("a", seed, 0.1, curve) for seed, curve in enumerate(curves)]
    lines += [run_line("a", 0, 0.2, [(30, 300, 44.0)])]
    (standing,) = standings(lines)
    assert (standing.base_lr, standing.tried, len(standing.runs)) == (0.1, (0.1, 0.2), 2)
    assert standing.knn == pytest.approx((46.5, 4.5**0.5))
    assert standing.to_target == [30, 11]
    assert standing.seconds == pytest.approx((20.5, 180.5**0.5))
    assert standing.images_per_second == pytest.approx((300 / 30 + 270 / 31) / 2)
    (missed,) = standings([*lines, run_line("a", 2, 0.1, [(30, 300, 44.9)])])
    assert (missed.reached, missed.seconds) == (2, None)
    assert missed.knn[1] == pytest.approx(np.std([45, 48, 44.9], ddof=1))
    assert standings(lines[:1])[0].knn == (45.0, None)


def test_nothing_is_interpolated_and_ties_go_to_the_lower_rate():
    assert seconds_to([(10, 1, 44.99), (20, 2, 45.0), (30, 3, 44.0)], 45.0) == 20
    assert seconds_to([(10, 1, 44.99)], 45.0) is None
    assert best_rate([run_line("a", 0, rate, [(1, 1, knn)]) for rate, knn in ((0.4, 5), (0.2, 5), (0.8, 4))]) == 0.2


def run_line(variant, seed, rate, curve, **more):
    seconds, images, knn = curve[-1]
    params = {"data": "cifar10", "images": 10000, "encoder": "cifar_resnet8", "size": 32, "batch": 64, "seconds": 30}
    return {
        "schema": 1, "benchmark": "time_to_accuracy", "variant": variant, "kind": "run",
        "params": {**params, "seed": seed, "base_lr": rate}, "samples_seconds": [], "environment": MACHINE,
        "knn": knn, "seconds": seconds, "images_per_second": images / seconds, "curve": curve, "target": 45.0,
        "precision": "bf16", "memory_format": "channels-last", "loader": "resident", **more,
    }  # fmt: skip


TABLE = """AMD EPYC, 2 cores, 2 threads; torch 2.15.0, triton 3.9.0; data cifar10, images 10000, \
encoder cifar_resnet8, size 32, batch 64, seconds 30, target 45 %, n = 1 to 2; \
commit 0123456789ab; 2026-01-31; solo-learn is absent: give a \
checkout.

| variant | kNN, % | s to the target | reached it | images/s | best base_lr | precision | memory | loader |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| fastsiam | 47.0 ± 1.4 | 15 ± 7 | 2 of 2 | 9.50 | 0.4 of 0.4 | bf16 | channels-last | resident |
| authors | 40.0 | - | 0 of 1 | 5.00 | 0.2 of 0.2, 0.4 | fp32 | contiguous | PIL, 1 workers |
| solo-learn | absent | absent | absent | absent | absent | absent | absent | absent |
"""
LINES = [
    run_line("fastsiam", 0, 0.4, [(10, 100, 30.0), (20, 200, 48.0)]),
    run_line("fastsiam", 1, 0.4, [(10, 80, 45.0), (20, 180, 46.0)]),
    run_line("authors", 0, 0.2, [(10, 50, 30.0), (20, 100, 40.0)], precision="fp32", memory_format="contiguous",
             loader="PIL, 1 workers"),
    run_line("authors", 0, 0.4, [(10, 50, 30.0), (20, 100, 35.0)]),
]  # fmt: skip


def test_the_table_to_the_letter():
    params = {key: value for key, value in LINES[0]["params"].items() if key not in ("seed", "base_lr")}
    absent = {**LINES[0], "variant": "solo-learn", "kind": "absent", "params": params, "absent": "give a checkout"}
    control = {**LINES[0], "variant": "control", "kind": "control"}
    assert render(TABLES["race"], [control, *LINES, absent]) == TABLE


def test_the_plot_has_a_line_a_run_and_their_mean(tmp_path, monkeypatch):
    found = standings(LINES)
    assert mean_curve([run["curve"] for run in found[0].runs]) == [(10, 90, 37.5), (20, 190, 47.0)]
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **kw: drawn.append((x, y)) or plot(self, x, y, **kw))
    paths = draw(found, [{"untrained_knn": 30.0}], tmp_path, "race")
    assert ([90, 190], [37.5, 47.0]) in drawn
    assert ([10, 20], [37.5, 47.0]) in drawn
    assert len(drawn) == 2 * (2 + 1 + 1 + 1)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text()


@pytest.mark.slow
def test_a_real_race_in_this_process(tmp_path, tiny, monkeypatch):
    """Ours and the authors' on 80 drawn images for a second each: every number follows from the curve."""
    monkeypatch.setattr(Peer, "candidates", lambda self: [Loading("PIL", 0)])
    path = tmp_path / "tiny.yaml"
    path.write_text(load_config("quickstart", tiny()).to_yaml())
    results = Results(tmp_path / "out", CPU)
    options = {"minutes_each": 0.02, "seeds": 1, "rates": ("1x",), "contestants": ("fastsiam", "authors")}
    run(results, device=CPU, minutes=1.0, config=str(path), target=0.0, call=lambda f, *a: f(*a), **options)
    lines = {line["variant"]: line for line in read(tmp_path / "out/time_to_accuracy.jsonl") if line["kind"] == "run"}
    assert set(lines) == {"fastsiam", "authors"}
    for line in lines.values():
        seconds, images, knn = line["curve"][-1]
        assert len(line["curve"]) == 2
        assert (line["seconds"], line["images"], line["knn"]) == (seconds, images, knn)
        assert line["images_per_second"] == images / seconds
        assert line["seconds_to_target"] == line["curve"][0][0] >= 0.6
        assert seconds >= 1.2
        assert images % 8 == 0
        # 40 images are classified.
        assert knn * 40 / 100 == pytest.approx(round(knn * 40 / 100))
        assert -1 <= line["final_loss"] <= 1
    assert lines["authors"]["loader"] == "PIL, 0 workers"
    assert (tmp_path / "out/time_to_accuracy.png").exists()


def test_lists_hold_equally_many_of_each_class(demo_folder, tmp_path):
    source = open_source(str(write_list(demo_folder / "train", 30, tmp_path, "--train")))
    assert np.bincount(source.labels).tolist() == [3] * 10
    whole = open_source(str(demo_folder / "train"))
    assert source.classes == whole.classes
    names = [bytes(name).decode().removeprefix("train/") for name in source.names]
    expected = [bytes(name).decode() for name in whole.names]
    of_class = [[name for name in expected if name.startswith(f"{label}/")] for label in whole.classes]
    assert names == [name for members in of_class for name in members[:3]]
    for count, code in ((25, "unequal-classes"), (90, "too-few-images")):
        with pytest.raises(UserError) as caught:
            write_list(demo_folder / "train", count, tmp_path, "--train")
        assert caught.value.code == code


def test_a_race_of_the_first_classes(race, demo_folder, tmp_path):
    _, lines = race(data=demo_folder, train=12, classes=3, contestants=("fastsiam",))
    params = lines[-1]["params"]
    assert (params["data"], params["images"]) == (f"{demo_folder.resolve().name}, 3 classes", 12)
    raced, whole = open_source(str(tmp_path / "out/images/train.txt")), open_source(str(demo_folder / "train"))
    assert (raced.classes, np.bincount(raced.labels).tolist()) == (whole.classes[:3], [4, 4, 4])
    with pytest.raises(UserError) as caught:
        race(data=demo_folder, classes=11)
    assert caught.value.code == "no-such-classes"


def test_rates_in_words():
    assert [in_words(word, 0.4) for word in ("0.5x", "1x", "0.3")] == [0.2, 0.4, 0.3]
    for wrong in ("x", "fast", "0", "-1x", "nan"):
        with pytest.raises(UserError) as caught:
            in_words(wrong, 0.4)
        assert caught.value.code == "not-a-rate"


def test_what_contestants_do_not_share_is_refused(tiny_config):
    check_config(tiny_config())
    for override, key in (
        ("optimizer.schedule=cosine_per_epoch", "optimizer.schedule"),
        ("views.solarize=0.2", "views.solarize"),
        ("views.crop_scale=[0.2, 0.9]", "views.crop_scale"),
        ("method.stop_gradient=false", "method.stop_gradient"),
    ):
        with pytest.raises(UserError) as caught:
            check_config(tiny_config(override))
        assert (caught.value.key, caught.value.code) == (key, "not-in-common")


@pytest.mark.parametrize("name", ["cifar10_cpu", "tiny_imagenet_cpu"])
def test_the_races_own_configs_can_race(name):
    config = load_config(f"benchmarks/race/{name}.yaml")
    check_config(config)
    assert (config.optimizer.warmup, EVALUATIONS) == (0.03, 10)


def test_a_wrong_contestant_is_one_sentence(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--contestants", "fastsiam,lightning"]
    assert time_to_accuracy.main(arguments) == 2
    assert "[unknown-contestant]" in capsys.readouterr().err


def test_a_line_of_another_kind_is_refused(tmp_path):
    (tmp_path / "time_to_accuracy.jsonl").write_text('{"schema": 1, "benchmark": "loss"}\n')
    with pytest.raises(UserError) as caught:
        Lines(SimpleNamespace(folder=tmp_path))
    assert caught.value.code == "other-benchmark"
