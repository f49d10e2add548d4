"""TensorBoard's files hold the numbers of metrics.jsonl, each once, whatever happens to the run and its disk."""

import math
import sys
import time
from collections import Counter

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fastsiam.runtime.files import json_lines
from fastsiam.train import main
from tests.support.files import largest_file
from tests.support.processes import run_python
from tests.support.run_folders import run_folder
from tests.support.runs import lines

POSITION = {"kind", "step", "epoch", "images_seen", "train_seconds", "wall_seconds"}


def accumulated(accumulator):
    """(tag, step, value) of every point that TensorBoard shows."""
    accumulator.Reload()
    return sorted(
        (tag, point.step, point.value) for tag in accumulator.Tags()["scalars"] for point in accumulator.Scalars(tag)
    )


def shown(folder):
    return accumulated(EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}))


def test_every_number_of_a_resumed_run_is_shown_once(tiny, tmp_path):
    for more in ("train.max_steps=13", "train.max_steps=null"):
        assert main(["--config", "quickstart", *tiny("evaluate.controls=true", more)]) == 0
    run = tmp_path / "runs/run"
    points = shown(run)
    assert [point for point in points if point[0].partition("/")[2] not in POSITION] == sorted(
        (f"{line['kind']}/{key}", line["step"], float(np.float32(value)))
        for line in lines(run)
        for key, value in line.items()
        if "step" in line and isinstance(value, int | float) and key not in POSITION
    )
    counted = Counter(tag for tag, _, _ in points)
    assert (counted["train/loss"], counted["train/lr"], counted["end/knn_top1"]) == (20, 20, 1)
    assert {"collapse/std_ratio", "collapse/effective_rank", "collapse/mean_abs_cos"} < set(counted)
    where = [(step, value) for tag, step, value in points if tag == "train/images_seen"]
    assert where == [(step, 8.0 * step) for step in range(1, 21)]
    assert not {"knn/epoch", "end/wall_seconds", "resume/images_seen"} & counted.keys()


@pytest.fixture
def folder(tmp_path):
    said = []

    def warn(notice):
        said.append(notice)
        made.write({"kind": "warning", "step": 0, "message": notice})

    made = run_folder(tmp_path, warn)
    made.said = said
    made.open({})
    made.write_header()
    yield made
    made.close()


def train(folder, *steps):
    for step in steps:
        folder.write({"kind": "train", "step": step, "loss": -step / 7})


def written(folder):
    return json_lines(folder.metrics_path.read_bytes())


def losses(points):
    return [(step, value) for tag, step, value in points if tag == "train/loss"]


def expected(*steps):
    return [(step, float(np.float32(-step / 7))) for step in steps]


def test_points_after_the_checkpoint_are_taken_back(folder):
    """From a TensorBoard that has read them, too; of one step some lines may be before the checkpoint, some after."""
    train(folder, 1, 2, 3)
    state = folder.metrics_state()
    folder.write({"kind": "knn", "step": 3, "knn_top1": 50.0})
    train(folder, 4, 5)
    looking = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    assert losses(accumulated(looking)) == expected(1, 2, 3, 4, 5)
    folder.restore_metrics(state)
    assert accumulated(looking) == [("train/loss", *point) for point in expected(1, 2, 3)]
    train(folder, 4)
    assert accumulated(looking) == [("train/loss", *point) for point in expected(1, 2, 3, 4)]
    assert shown(folder.path) == accumulated(looking)


def test_a_run_that_starts_over_shows_none_of_the_points_before(folder):
    train(folder, 1, 2, 3)
    folder.write_header()
    train(folder, 1)
    assert losses(shown(folder.path)) == expected(1)


def test_a_tenth_file_of_a_process_is_read_after_its_ninth(folder, monkeypatch):
    """Names are in the order of the starts: TensorBoard compares their counts as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    time.sleep(1 - time.time() % 1)  # Both starts would be in one second.
    train(folder, 1, 2, 3)
    folder.write_header()
    train(folder, 1)
    assert losses(shown(folder.path)) == expected(1)


def test_what_is_not_a_finite_number_has_no_point(folder):
    folder.write({"kind": "train", "step": 1, "loss": math.nan, "lr": None, "compiled": True, "text": "3", "n": 2})
    folder.write({"kind": "bad_file", "reason": "no step", "size": 3})
    assert shown(folder.path) == [("train/n", 1, 2.0)]


# TensorBoard's thread ends with the error, which the next line raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_warns_once_and_the_next_start_goes_on(folder):
    train(folder, 1)
    (file,) = (folder.path / "tensorboard").iterdir()
    with largest_file(file.stat().st_size):
        train(folder, 2, 3)
        state = folder.metrics_state()
    assert [notice.code for notice in folder.said].count("tensorboard-unwritten") == 1
    assert losses(shown(folder.path)) == expected(1)
    folder.restore_metrics(state)
    train(folder, 4)
    assert losses(shown(folder.path)) == expected(1, 3, 4)
    assert [line["step"] for line in written(folder) if line["kind"] == "train"] == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_made_warns_once(folder):
    folder.close()
    (folder.path / "tensorboard").write_text("")
    folder.write_header()
    train(folder, 1, 2)
    assert [notice.code for notice in folder.said] == ["tensorboard-unwritten"]
    assert [line["step"] for line in written(folder) if line["kind"] == "train"] == [1, 2]


def test_without_the_package_a_run_goes_on_and_warns(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder.write_header()
    train(folder, 1)
    assert [notice.code for notice in folder.said] == ["no-tensorboard"]
    assert [line["kind"] for line in written(folder)] == ["header", "train", "warning"]


@pytest.mark.slow
def test_tensorboard_is_not_imported_before_a_run_begins(tiny):
    code = "import sys; from fastsiam.train import main; main(sys.argv[1:]); print('tensorboard.compat' in sys.modules)"
    for arguments in (["--config", "nothing"], ["--config", "quickstart", "--dry-run", *tiny()]):
        done = run_python("-c", code, *arguments)
        assert done.stdout.splitlines()[-1] == "False", done.stderr
