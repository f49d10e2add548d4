"""A step that is replayed has the crops and the loss that it had in the run, and the run stays as it was."""

import csv
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from fastsiam.__main__ import main
from fastsiam.config import load_config
from fastsiam.data.sources.open import open_source
from fastsiam.methods import build_method
from fastsiam.replay import replay as module
from fastsiam.training.step import TrainingStep
from tests.support.refusals import refused
from tests.support.runs import EVERY_STEP, lines, train_here

GROWING = ("views.size=16..32", "optimizer.schedule=cosine_per_epoch", "data.val=null", "checkpoint.keep=3", EVERY_STEP)


def digest(views):
    return [hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest() for view in views]


@pytest.fixture
def record(monkeypatch):
    """`record(overrides, ...)`: trains; returns digests of the views and the indices of each step, as trained."""

    def run(overrides, **how):
        seen, real = {}, TrainingStep.__call__

        def step(self, views, number, indices, progress):
            seen[number] = digest(views), indices.tolist()
            return real(self, views, number, indices, progress)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingStep, "__call__", step)
            train_here(overrides, **how)
        return seen

    return run


@pytest.fixture
def again(monkeypatch, tmp_path, capsys):
    """`again(step, ...)`: replays a step of runs/run; returns its findings, views, and the lines by their labels."""

    def run(step, *more):
        seen, real = [], module.examine

        def spied(method, views, *rest):
            seen.extend((views, real(method, views, *rest)))
            return seen[1]

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(module, "examine", spied)
            assert main(["replay", str(tmp_path / "runs/run"), "--step", str(step), *map(str, more)]) == 0
        said = {}
        for line in capsys.readouterr().out.splitlines():
            said.setdefault(line[:10].strip(), []).append(line[10:])
        views, found = seen or (None, None)
        return found, views, said

    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "replay" not in path.parts}


def table(folder):
    with open(folder / "images.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def logged(folder):
    return {line["step"]: line for line in lines(folder) if line["kind"] == "train"}


def test_steps_have_the_crops_and_the_loss_of_the_run_which_stays_as_it_was(tiny, demo_folder, tmp_path, record, again):
    """Across the end of an epoch, at which the views grow; another process holds the lock, as of a running run."""
    seen, folder = record(tiny(*GROWING)), tmp_path / "runs/run"
    trained, names = logged(folder), open_source(f"{demo_folder}/train").names
    assert trained[10]["view_size"] == 16 < trained[11]["view_size"]
    before = contents(folder)
    with FileLock(folder / "lock"):
        for step, more in ((3, "--from-start"), (11, "--from-start"), (20, "--images=3")):
            found, views, said = again(step, more)
            assert digest(views) == seen[step][0]
            assert found.loss == trained[step]["loss"]
            assert said["logged"] == ["equal: metrics.jsonl has the same loss"]
            assert said["finite"][0].startswith("yes")
            rows = table(folder / f"replay/step-{step}")
            assert [row["image"].encode() for row in rows] == names[seen[step][1]].tolist()
            assert [row["replaces"] for row in rows] == [""] * 8
            assert np.mean([float(row["loss"]) for row in rows]) == pytest.approx(found.loss, abs=1e-5)
    assert contents(folder) == before
    assert "none" in again(1)[2]["loss"][0]
    assert [row["row"] for row in rows] == ["1", "2", "3", *[""] * 5]
    pixels = (views[0].numpy().transpose(0, 2, 3, 1) * 0.25 + 0.5).clip(0, 1) * 255
    picture = np.asarray(Image.open(folder / "replay/step-20/views.png"))
    assert picture.shape == (3 * 34 - 2, 2 * 34 - 2, 3)
    for row in range(3):
        for view in range(2):
            cell = picture[34 * row :, 34 * view :][:32, :32]
            np.testing.assert_allclose(cell, pixels[8 * view + row], atol=0.501)


def test_gradients_are_those_of_a_loop_over_pairs(tiny, tmp_path, again):
    """Norms of a loss written out in float64, with weights of the checkpoint before the step."""
    train_here(tiny("data.val=null"), stop_after=3)
    found, views, said = again(4)
    assert said["note"][0].startswith("the run has come to step 3")
    saved = torch.load(tmp_path / "runs/run/checkpoint.pt", weights_only=True)

    method = build_method(load_config(tmp_path / "runs/run/config.yaml")).double()
    method.load_state_dict(saved["method"])
    z = method.projector(method.encoder(views[0].double()))
    p = method.predictor(z)
    (p1, p2), (z1, z2) = p.chunk(2), z.detach().chunk(2)
    cosine = torch.nn.functional.cosine_similarity
    losses = -(cosine(p1, z2) + cosine(p2, z1)) / 2
    losses.mean().backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in method.named_parameters()}
    np.testing.assert_allclose(found.losses, losses.detach(), atol=1e-4)
    assert dict(found.largest) == pytest.approx({name: norms[name] for name, _ in found.largest}, rel=1e-3)
    assert found.largest[0][0] == max(norms, key=norms.get)
    for part, norm in found.norms.items():
        mine = [norms[name] ** 2 for name in norms if part == "total" or name.startswith(part)]
        assert norm == pytest.approx(math.sqrt(sum(mine)), rel=1e-3)


def test_a_step_of_micro_batches_is_cut_as_in_the_run(tiny, tmp_path, again):
    train_here(tiny("data.val=null", "train.micro_batch=4", "train.max_steps=2"))
    found, _, said = again(2, "--from-start")
    assert found.loss == logged(tmp_path / "runs/run")[2]["loss"]
    assert said["logged"] == ["equal: metrics.jsonl has the same loss"]
    assert found.losses.shape == (8,)
    assert found.losses.mean() == pytest.approx(found.loss, abs=1e-5)


def test_a_resumed_run_with_more_epochs_has_both_schedules(tiny, tmp_path, record, again):
    first = record(tiny(*GROWING, "train.epochs=2"), stop_after=13)
    second = record(tiny(*GROWING, "train.epochs=4", "train.max_steps=24"))
    trained = logged(tmp_path / "runs/run")
    for step, seen in ((12, first), (15, second), (24, second)):
        found, views, _ = again(step, "--from-start")
        assert (digest(views), found.loss) == (seen[step][0], trained[step]["loss"])


def test_a_bad_file_is_replaced_as_in_the_run(tiny, demo_folder, tmp_path, record, again):
    data = tmp_path / "data"
    shutil.copytree(demo_folder / "train", data)
    broken = sorted(data.rglob("*.jpg"))[::9]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-300])
    (tmp_path / "moved").mkdir()
    more = (f"data.train={data}", "data.val=null", "data.max_bad_fraction=0.5", "train.epochs=1", EVERY_STEP)
    seen, folder = record(tiny(*more)), tmp_path / "runs/run"
    assert (folder / "skip.tsv").read_bytes().count(b"\n") == len(broken) == 9
    data.rename(tmp_path / "moved/data")
    replaced = set()
    for step in (2, 9):
        found, views, _ = again(step, "--from-start", "--data", tmp_path / "moved/data")
        assert (digest(views), found.loss) == (seen[step][0], logged(folder)[step]["loss"])
        replaced |= {row["replaces"] for row in table(folder / f"replay/step-{step}")} - {""}
    assert replaced
    assert replaced <= {str(path.relative_to(data)) for path in broken}


def test_an_image_that_failed_once_is_there_before_and_replaced_after(tiny, tmp_path, again):
    """As where a network drive did not answer: the file is whole again."""
    train_here(tiny("data.val=null"))
    folder = tmp_path / "runs/run"
    again(5)
    name = table(folder / "replay/step-5")[2]["image"]
    (folder / "skip.tsv").write_text(f"{name}\t{name} cannot be read\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"kind": "bad_file", "step": 7, "message": f"{name} cannot be read", "bad_files": 1}) + "\n"
        )
    replaced = []
    for step in (5, *range(11, 21)):
        again(step)
        rows = table(folder / f"replay/step-{step}")
        assert (name in [row["image"] for row in rows]) == (step == 5)
        replaced += [row["replaces"] for row in rows if row["replaces"]]
    assert replaced == [name]


@pytest.mark.parametrize("every", [1, 4])
def test_a_budget_of_time_is_exact_where_every_step_is_logged(tiny, tmp_path, record, again, every):
    """Ten minutes, of which the start of the process takes a share that differs from run to run."""
    more = ("budget=10min", "train.epochs=null", "train.max_steps=8", f"train.log_every_steps={every}", "data.val=null")
    seen = record(tiny(*more, "optimizer.schedule=cosine"))
    found, views, said = again(8, "--from-start")
    assert digest(views) == seen[8][0]
    notes = [note for note in said.get("note", []) if "interpolated" in note]
    trained = logged(tmp_path / "runs/run")[8]["loss"]
    if every == 1:
        assert (found.loss, notes) == (trained, [])
    else:
        assert found.loss == pytest.approx(trained, abs=0.05)
        assert notes[0].startswith("learning rates of 6 of the 7 steps")
    assert refused("replay", tmp_path / "runs/run", "--step", 9).code == "no-such-step"


def test_what_is_not_finite_is_named(tiny, tmp_path, again):
    """Steps so large that the weights overflow: the run fails, and the replay says at which tensor."""
    result, _ = train_here(tiny("optimizer.base_lr=1e36", "data.val=null", "train.log_every_steps=7"))
    assert result.status == "failed"
    step = int((tmp_path / "runs/run/nonfinite.txt").read_text().split()[1])
    found, _, said = again(step, "--from-start")
    assert not math.isfinite(found.loss)
    assert found.first_bad.startswith("the output of")
    assert said["finite"][0].endswith(f"{found.first_bad} came first")
    assert "all 8 images" in said["images"][0] + said.get("losses", [""])[0]
    assert "metrics.jsonl has no line" in said["logged"][0]
    assert again(7, "--from-start")[2]["note"][-1].endswith(f"--step {step} shows where it began")


def test_rows_that_are_not_finite_come_first_in_the_picture(tiny, tmp_path, again, monkeypatch):
    train_here(tiny("data.val=null"), stop_after=2)
    real = module.examine

    def spoiled(method, views, *rest):
        views[0][8 + 5, 0, 3, 3] = math.nan
        return real(method, views, *rest)

    monkeypatch.setattr(module, "examine", spoiled)
    found, _, said = again(3, "--images", 2)
    assert (found.first_bad, found.bad_images) == ("the views", [5])
    rows = table(tmp_path / "runs/run/replay/step-3")
    assert [row["row"] for row in rows] == ["2", "", "", "", "", "1", "", ""]
    assert said["images"][0] == f"not finite there: 1 of 8: {rows[5]['image']}"


def test_mistakes_are_refused_and_nothing_is_written(tiny, demo_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo_folder / "train", data)
    train_here(tiny(f"data.train={data}", "data.val=null", "train.max_steps=2"))
    train_here(tiny("data.backend=synthetic", "data.train=null", "data.val=null", "run.name=no", "train.max_steps=2"))
    run = tmp_path / "runs/run"
    before = sorted(tmp_path.rglob("*"))

    def code(*arguments):
        return refused("replay", *arguments).code

    assert code(tmp_path / "nowhere", "--step", 1) == "no-run-folder"
    assert code(tmp_path / "runs", "--step", 1) == "not-a-run"
    assert code(tmp_path / "runs/no", "--step", 1) == "synthetic-run"
    assert code(run, "--step", 0) == code(run, "--step", 3) == "no-such-step"
    assert code(run, "--step", 1, "--images", 0) == "no-images"
    assert code(run, "--step", 1, "--data", tmp_path / "absent") == "data-gone"
    assert code(run, "--step", 1, "--out", data / "blobs/00000.jpg/under") == "replay-unwritten"
    first = sorted(data.rglob("*.jpg"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole + b"\0")
    assert code(run, "--step", 1) == "other-data"
    first.write_bytes(whole)
    assert sorted(tmp_path.rglob("*")) == before
    environment = json.loads((run / "environment.json").read_text())
    shutil.rmtree(data)
    assert code(run, "--step", 1) == "data-gone"
    assert not data.exists()
    assert environment["data"]
