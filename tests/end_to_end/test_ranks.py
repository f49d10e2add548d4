"""A run over several ranks is the run of one rank: the same order, losses, measures, and place to go on from."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from fastsiam.__main__ import main
from fastsiam.config import load_config
from fastsiam.data.rng import epoch_order
from fastsiam.data.sources.open import open_source
from fastsiam.errors import UserError
from tests.support.compiling import replaced_backend
from tests.support.runs import lines, numbers, train_here

pytestmark = pytest.mark.slow


def refused_here(overrides):
    """Key and code of the error of a run that does not begin, or the exit code of a rank that leaves in silence."""
    try:
        return train_here(overrides)
    except UserError as error:
        return error.key, error.code
    except SystemExit as error:
        return error.code


@pytest.fixture
def wider(tiny):
    """Batches of 16 images; fp32 rounding grows from 1e-7 to 6e-4 in 15 steps, at ten times the rate to 0.05 in 7."""
    return lambda name, *more: tiny(
        "train.batch_size=16", "optimizer.base_lr=0.05", "evaluate.controls=true", f"run.name={name}", *more
    )


def test_losses_knn_and_measures_are_those_of_one_rank(ranks, wider, tmp_path):
    train_here(wider("one"))
    for size in (2, 4):
        results = ranks(size, train_here, wider(f"on{size}"))
        assert [result for result, _ in results] == [results[0][0]] * size
        one, many = tmp_path / "runs/one", tmp_path / f"runs/on{size}"
        assert results[0][0].knn_top1 == json.loads((one / "status.json").read_text())["knn_top1"]
        for kind, *names in (
            ("train", "step", "epoch", "images_seen", "loss", "lr"),
            ("collapse", "step", "std_ratio", "effective_rank", "mean_abs_cos"),
            ("knn", "step", "knn_top1"),
        ):
            expected, found = numbers(one, kind, *names), numbers(many, kind, *names)
            assert len(expected) == {"train": 10, "collapse": 1, "knn": 3}[kind]
            # fp32 over ten steps: the order of sums differs.
            np.testing.assert_allclose(found, expected, atol=5e-4)
        header, *_ = lines(many)
        assert header["kind"] == "header"


def images_of(results, epoch):
    """All images that the finished steps of an epoch have consumed, of all ranks, in the order of the epoch."""
    steps = zip(*([indices for e, indices in seen if e == epoch] for _, seen in results), strict=True)
    return [index for step in steps for indices in step for index in indices]


def test_started_on_two_ranks_it_goes_on_on_four_and_on_one(ranks, wider, tmp_path):
    overrides = wider("moved", "train.epochs=3", "evaluate.knn_every_epochs=null")
    parts = [ranks(2, train_here, overrides, 3), ranks(4, train_here, overrides, 8), [train_here(overrides)]]
    assert [part[0][0].status for part in parts] == ["preempted", "preempted", "done"]
    assert [part[0][0].step for part in parts] == [3, 8, 15]
    for epoch in range(3):
        found = [index for part in parts for index in images_of(part, epoch)]
        assert found == epoch_order(0, epoch, 80)[:80].tolist()
    train_here(wider("whole", "train.epochs=3", "evaluate.knn_every_epochs=null"))
    whole, moved = (numbers(tmp_path / "runs" / name, "train", "step", "loss") for name in ("whole", "moved"))
    # Seen: 7e-8 in the first three steps, 5.5e-4 in the twelfth.
    np.testing.assert_allclose(moved[:3], whole[:3], atol=1e-6)
    np.testing.assert_allclose(moved, whole, atol=2e-3)
    resumed = [line["world_size"] for line in lines(tmp_path / "runs/moved") if line["kind"] == "resume"]
    assert resumed == [4, 1]


def spoil_third(world, number, views):
    if number == 3 and world.rank == world.size - 1:
        views[0][0, 0, 0, 0] = torch.nan


def test_no_checkpoint_is_written_between_a_bad_step_and_its_discovery(wider, tmp_path):
    overrides = wider("spoilt", "train.log_every_steps=1000", "checkpoint.every_seconds=0.0001")
    result, _ = train_here(overrides, spoil=spoil_third)
    assert (result.status, result.step) == ("failed", 3)
    saved = torch.load(tmp_path / "runs/spoilt/checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 2
    assert all(value.isfinite().all() for value in saved["method"].values())


def test_the_nan_of_one_rank_stops_all_within_the_log_interval(ranks, wider, tmp_path, demo_folder):
    """A resumed run; steps 2, 3 and 4 come after the checkpoint, which stays."""
    folder, overrides = tmp_path / "runs/spoilt", wider("spoilt", "train.log_every_steps=4")
    ranks(2, train_here, overrides, 1)
    saved = (folder / "checkpoint.pt").read_bytes()
    results = ranks(2, train_here, overrides, None, spoil_third)
    assert [(result.status, result.exit_code, result.step) for result, _ in results] == [("failed", 4, 4)] * 2
    first, *names = (folder / "nonfinite.txt").read_text().splitlines()
    # Statistics are those of all ranks, so the loss of each is spoilt.
    assert first == "step 3"
    source = open_source(f"{demo_folder}/train")
    third = [(rank, index) for rank, (_, seen) in enumerate(results) for index in seen[1][1]]
    assert names == [f"rank {rank}\t{source.name(index)}" for rank, index in third]
    assert len(names) == 16
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 4)
    assert (folder / "checkpoint.pt").read_bytes() == saved


def test_what_one_rank_cannot_decode_is_left_out_by_all(ranks, wider, tmp_path, demo_folder):
    shutil.copytree(demo_folder, tmp_path / "demo")
    train = tmp_path / "demo/train"
    first = epoch_order(0, 0, 80)
    names = open_source(str(train)).names
    # One in the second rank's part of the second step, one in the first rank's part of the third.
    bad = [names[first[16 + 8 + 3]].decode(), names[first[32 + 1]].decode()]
    for name in bad:
        (train / name).write_bytes(bytes((train / name).stat().st_size))
    overrides = wider("bad", f"data.train={train}", "data.val=null", "data.max_bad_fraction=0.1")
    results = ranks(2, train_here, [*overrides, "train.epochs=4"])
    assert [result.status for result, _ in results] == ["done", "done"]
    skipped = (tmp_path / "runs/bad/skip.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in skipped) == sorted(bad)
    told = [line for line in lines(tmp_path / "runs/bad") if line["kind"] == "bad_file"]
    assert [line["bad_files"] for line in told] == [1, 2]
    for epoch in range(4):
        assert len(images_of(results, epoch)) == 80
        assert not {first[16 + 8 + 3], first[32 + 1]} & set(images_of(results, epoch))


def test_fewer_labelled_images_than_ranks_are_counted_once(ranks, wider, tmp_path, demo_folder):
    for folder in sorted((demo_folder / "val").iterdir())[:2]:
        shutil.copytree(folder, tmp_path / "val" / folder.name, ignore=shutil.ignore_patterns("*[1-9].jpg"))
    overrides = wider("few", f"data.val={tmp_path}/val", "train.max_steps=1", "evaluate.controls=false")
    top1 = {result.knn_top1 for result, _ in ranks(4, train_here, overrides)}
    alone, _ = train_here([*overrides, "run.name=alone"])
    assert top1 == {alone.knn_top1}
    assert len(list((tmp_path / "val").glob("*/*.jpg"))) == 2


def test_what_one_rank_refuses_ends_all_and_is_told_once(ranks, wider, tmp_path, photos):
    mine = wider("differ", "data.val=null", "train.batch_size=8")
    assert ranks(2, refused_here, (mine, [*mine, f"data.train={photos}"])) == [(None, "ranks-differ"), 2]
    assert ranks(2, refused_here, (mine, [*mine, "train.epochs=7"])) == [("train.epochs", "ranks-differ"), 2]
    odd = [*mine, "train.batch_size=15"]
    assert ranks(2, refused_here, odd) == [("train.batch_size", "batch-not-divisible"), 2]
    assert not (tmp_path / "runs").exists()


def train_compiled(overrides):
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        # Inductor on two ranks is in tests/models/test_batch_norm_ranks.py; here it would compile for a minute.
        replaced_backend(patch, lookup_backend("aot_eager"))
        return train_here(overrides)


def test_compiled_on_two_ranks_it_trains_as_in_eager_mode(ranks, wider, tmp_path):
    """One graph with its collectives inside DDP."""
    shared = ("data.val=null", "train.max_steps=4", "train.log_every_steps=1")
    train_here(wider("one", *shared))
    ranks(2, train_compiled, wider("compiled", *shared, "train.compile=on"))
    one, compiled = tmp_path / "runs/one", tmp_path / "runs/compiled"
    expected, found = (numbers(folder, "train", "step", "loss") for folder in (one, compiled))
    np.testing.assert_allclose(found, expected, atol=5e-5)
    (line,) = [line for line in lines(compiled) if line["kind"] == "compile"]
    assert (line["graphs"], line["recompiles"]) == (1, 0)
    weights = [torch.load(folder / "checkpoint.pt", weights_only=True)["method"] for folder in (one, compiled)]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)


def test_a_replay_makes_the_batch_of_all_ranks_on_one(ranks, wider, tmp_path, capsys):
    (_, first), (_, second) = ranks(2, train_here, wider("two", "train.epochs=1", "data.val=null"))
    folder = tmp_path / "runs/two"
    assert main(["replay", str(folder), "--step", "4", "--from-start"]) == 0
    said = capsys.readouterr().out
    assert "those of all 2 processes" in said
    assert "2 processes, and this start has 1 process" in said
    rows = (folder / "replay/step-4/images.tsv").read_text().splitlines()[1:]
    names = open_source(load_config(folder / "config.yaml").data.train).names
    assert [row.split("\t")[1].encode() for row in rows] == names[[*first[3][1], *second[3][1]]].tolist()
    loss = float(next(line for line in said.splitlines() if line.startswith("loss")).split()[1])
    assert loss == pytest.approx(numbers(folder, "train", "loss")[3, 0], abs=5e-4)
