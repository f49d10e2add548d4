"""TensorBoard's files hold the numbers of metrics.jsonl, each once, whatever happens to the run and its disk."""

import json
import math
import shutil
import signal
import sys
from collections import Counter

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from fastsiam.train import main
from tests.support.files import NO_SPACE, largest_file
from tests.support.processes import run_python
from tests.support.run_folders import run_folder
from tests.support.runs import EVERY_STEP, lines, start, wait_for_step

WHERE = {"kind", "step", "epoch", "images_seen", "train_seconds", "wall_seconds"}


def accumulated(accumulator):
    """(tag, step, value) of every point that TensorBoard shows."""
    accumulator.Reload()
    return sorted(
        (tag, point.step, point.value) for tag in accumulator.Tags()["scalars"] for point in accumulator.Scalars(tag)
    )


def shown(folder):
    return accumulated(EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}))


def recorded(folder):
    """The same of metrics.jsonl: every number of a line with a step."""
    return sorted(
        (f"{line['kind']}/{key}", line["step"], float(np.float32(value)))
        for line in lines(folder)
        for key, value in line.items()
        if "step" in line and isinstance(value, int | float) and key not in WHERE
    )


def mirrored(folder):
    """As `shown`, without where the run was, of which the train lines tell."""
    return [point for point in shown(folder) if point[0].partition("/")[2] not in WHERE]


def test_every_number_of_a_run_is_shown_once(tiny, tmp_path):
    assert main(["--config", "quickstart", *tiny("evaluate.controls=true")]) == 0
    run = tmp_path / "runs/run"
    points = mirrored(run)
    assert points == recorded(run)
    counted = Counter(tag for tag, _, _ in points)
    assert (counted["train/loss"], counted["train/lr"], counted["knn/knn_top1"]) == (20, 20, 3)
    assert {"collapse/std_ratio", "collapse/effective_rank", "collapse/mean_abs_cos", "end/knn_top1"} < set(counted)
    where = [(step, value) for tag, step, value in shown(run) if tag == "train/images_seen"]
    assert where == [(step, 8.0 * step) for step in range(1, 21)]
    assert not [tag for tag, _, _ in shown(run) if tag in ("knn/epoch", "end/wall_seconds", "resume/images_seen")]
    (file,) = (run / "tensorboard").iterdir()
    version, *events = EventFileLoader(str(file)).Load()
    assert version.file_version == "brain.Event:2"
    times = [event.wall_time for event in events]
    assert times == sorted(times)
    assert file.stat().st_mtime == pytest.approx(times[-1], abs=5)


def test_a_run_that_was_killed_and_goes_on_shows_no_point_twice(tiny, tmp_path):
    slower = ("train.epochs=3", "views.size=32", "model.width=16")
    run = tmp_path / "runs/run"
    process = start(tiny(*slower, "checkpoint.every_seconds=0.2"))
    wait_for_step(process, run, 16)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (killed,) = (run / "tensorboard").iterdir()
    points = mirrored(run)
    # A line is in metrics.jsonl first: of the last one the kill may have kept its event.
    assert points == [point for point in recorded(run) if point in points]
    assert {step for _, step, _ in set(recorded(run)) - set(points)} <= {max(step for _, step, _ in recorded(run))}
    assert main(["--config", "quickstart", *tiny(*slower, EVERY_STEP, "train.max_steps=25")]) == 0
    assert main(["--config", "quickstart", *tiny(*slower)]) == 0
    assert [line["kind"] for line in lines(run)].count("resume") == 2
    points = mirrored(run)
    assert points == recorded(run)
    assert [step for tag, step, _ in points if tag == "train/loss"] == list(range(1, 31))
    before, last = sorted((run / "tensorboard").iterdir())
    assert not killed.exists()
    assert (before.stat().st_size, last.stat().st_size > 0) == (0, True)


@pytest.fixture
def folder(tmp_path):
    said = []

    def warn(sentence):
        said.append(sentence)
        made.write({"kind": "warning", "step": 0, "message": sentence})

    made = run_folder(tmp_path, warn)
    made.said = said
    made.open({})
    made.write_header()
    return made


def train(folder, *steps):
    for step in steps:
        folder.write({"kind": "train", "step": step, "loss": -step / 7, "wall_seconds": 10.0 * step})


def losses(points):
    return [(step, value) for tag, step, value in points if tag == "train/loss"]


def expected(*steps):
    return [(step, float(np.float32(-step / 7))) for step in steps]


def test_one_that_looks_on_forgets_what_a_resume_has_cut_off(folder):
    train(folder, 1, 2, 3)
    state = folder.metrics_state()
    train(folder, 4, 5)
    looking = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    assert losses(accumulated(looking)) == expected(1, 2, 3, 4, 5)
    (folder.path / "tensorboard/notes.txt").write_text("mine")
    folder.restore_metrics(state)
    train(folder, 4)
    assert losses(accumulated(looking)) == expected(1, 2, 3, 4)
    assert (folder.path / "tensorboard/notes.txt").read_text() == "mine"


def test_after_a_resume_time_goes_on_without_the_pause(folder):
    train(folder, 1, 2, 3)
    folder.restore_metrics(folder.metrics_state())
    _, file = sorted((folder.path / "tensorboard").iterdir())
    times = [event.wall_time for event in EventFileLoader(str(file)).Load() if event.summary.value]
    assert np.diff(times) == pytest.approx([10, 10], abs=1e-3)
    assert times[-1] == pytest.approx(file.stat().st_mtime, abs=2)


def test_what_is_no_finite_number_is_no_point(folder):
    folder.write({"kind": "train", "step": 1, "loss": math.nan, "lr": None, "compiled": True, "text": "3", "n": 2})
    folder.write({"kind": "bad_file", "reason": "no step", "size": 3})
    assert shown(folder.path) == [("train/n", 1, 2.0)]


def test_a_disk_that_is_full_stops_nothing_and_gets_every_point_later(folder):
    train(folder, 1)
    (file,) = (folder.path / "tensorboard").iterdir()
    whole = file.stat().st_size
    with largest_file(whole + 20):
        train(folder, 2, 3)
        assert file.stat().st_size == whole
        assert losses(shown(folder.path)) == expected(1)
    reason = "could not be written (File too large); its points wait in memory, and metrics.jsonl has them all"
    assert [said for said in folder.said if "tensorboard" in said] == [f"{folder.path}/tensorboard {reason}"]
    train(folder, 4)
    assert losses(shown(folder.path)) == expected(1, 2, 3, 4)


@pytest.mark.parametrize("obstacle", ["file", "full"])
def test_a_folder_that_cannot_be_written_is_told_once(folder, obstacle):
    shutil.rmtree(folder.path / "tensorboard")
    if obstacle == "file":
        (folder.path / "tensorboard").write_text("")
    else:
        (folder.path / "tensorboard").mkdir()
        folder._events._file._path.symlink_to("/dev/full")
    train(folder, 1, 2, 3)
    (sentence,) = folder.said
    assert sentence.startswith(f"{folder.path}/tensorboard could not be written (")
    assert obstacle == "file" or NO_SPACE in sentence
    assert [line["step"] for line in lines(folder.path) if line["kind"] == "train"] == [1, 2, 3]
    folder.close()
    assert len(folder.said) == 1


def test_without_the_package_a_run_goes_on_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    said = []
    folder = run_folder(tmp_path, said.append)
    folder.open({})
    folder.write_header()
    train(folder, 1)
    assert len(said) == 1
    assert "no TensorBoard files are written: the package tensorboard cannot be imported" in said[0]
    assert [json.loads(line)["kind"] for line in folder.metrics_path.read_text().splitlines()] == ["header", "train"]


def test_tensorboard_is_not_imported_before_a_run_begins(tiny):
    """Importing it takes 0.2 s."""
    code = "import sys; from fastsiam.train import main; main(sys.argv[1:]); print('tensorboard.compat' in sys.modules)"
    for arguments in (["--config", "nothing"], ["--config", "quickstart", "--dry-run", *tiny()]):
        done = run_python("-c", code, *arguments)
        assert done.stdout.splitlines()[-1] == "False", done.stderr
    done = run_python("-c", code, "--config", "quickstart", *tiny("train.max_steps=1"))
    assert done.stdout.splitlines()[-1] == "True"
