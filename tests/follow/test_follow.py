"""A run in a tracker: its numbers once, by training step, over restarts of the copying and resumptions of the run."""

import json
import os
import sys
import time

import pytest
from filelock import FileLock

from fastsiam.__main__ import main
from fastsiam.errors import UserError
from fastsiam.follow import follow as module
from tests.support.refusals import refused
from tests.support.run_folders import at, train_line, write_run
from tests.support.wandb_files import records, values

BEGUN = [{"kind": "header", "schema": 1, "name": "run"}, {"kind": "knn", "step": 0, "knn_top1": 31.25, "control": "x"}]


def train(*steps):
    return [train_line(step, loss=None if step == 3 else -step / 64) for step in steps]


def append(folder, *lines, status="running", **details):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (folder / "status.json").write_text(json.dumps({"status": status, "pid": os.getpid(), **details}))


def stopped_and_resumed(folder, follow):
    """A run that is stopped at step 6, resumed from its checkpoint of step 4, and done at step 9; followed twice."""
    end = at("end", 6, status="preempted", knn_top1=62.5)
    write_run(folder, [*BEGUN, *train(1, 2, 3, 4, 5, 6), end], {"status": "preempted"}, pictures=False)
    follow()
    follow()
    (folder / "metrics.jsonl").unlink()
    slow = at("warning", 8, message="slow", code="slow-disk")
    append(folder, *BEGUN, *train(1, 2, 3, 4), at("resume", 4, world_size=1), *train(5, 6, 7, 8), slow)
    append(folder, *train(9), at("end", 9, status="done", knn_top1=75.0), status="done")
    follow()


LOSSES = [(step, -step / 64) for step in (1, 2, 4, 5, 6, 7, 8, 9)]


@pytest.mark.needs("mlflow")
def test_mlflow_has_every_number_once_at_its_step(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["follow", str(folder), "--to", "mlflow", "--offline", "--project", "tests"]
    stopped_and_resumed(folder, lambda: main(command) == 0 or pytest.fail(capsys.readouterr().err))
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((folder / "follow-mlflow-offline.json").read_text())["run_id"]
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")

    def history(name):
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]

    assert history("train/loss") == LOSSES
    assert history("knn/knn_top1") == [(0, 31.25)]
    assert history("end/knn_top1") == [(6, 62.5), (9, 75.0)]
    assert run.data.params["train.batch_size"] == "64"
    assert (run.data.tags["end/status"], run.data.tags["warning/message"]) == ("done", "slow")
    assert capsys.readouterr().out.splitlines()[-1] == f"followed  {folder} to its end: done"
    assert refused(*command[:-1], "other").code == "other-project"


def written_by_wandb(folder, parts):
    """All records, once so many parts have their last one: wandb's own process writes them, and may be behind."""
    began = time.monotonic()
    while True:
        paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        found = [record for path in paths for record in records(path)]
        if sum(record.HasField("exit") for record in found) >= parts or time.monotonic() - began > 60:
            return found
        time.sleep(0.1)


@pytest.mark.needs("wandb")
def test_wandb_has_every_number_once_at_its_step(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["follow", str(folder), "--to", "wandb", "--offline"]
    stopped_and_resumed(folder, lambda: main(command) == 0 or pytest.fail(capsys.readouterr().err))
    found = written_by_wandb(folder, parts=2)
    # The second command found nothing new and began none.
    begun = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert [run.run_id for run in begun] == 2 * [
        json.loads((folder / "follow-wandb-offline.json").read_text())["run_id"]
    ]
    assert (begun[0].project, begun[0].display_name) == ("fastsiam", "run")
    assert values(begun[0].config.update)["train"]["batch_size"] == 64
    rows = [(record.history.step.num, values(record.history.item)) for record in found if record.HasField("history")]
    assert [(row["step"], row["train/loss"]) for _, row in rows if "train/loss" in row] == LOSSES
    assert [(row["step"], row["end/knn_top1"]) for _, row in rows if "end/knn_top1" in row] == [(6, 62.5), (9, 75.0)]
    numbers = [number for number, _ in rows]
    assert numbers == sorted(set(numbers))
    assert {(r.metric.glob_name, r.metric.step_metric) for r in found if r.HasField("metric")} == {("*", "step")}
    summary = {}
    for record in found:
        summary |= values(record.summary.update) if record.HasField("summary") else {}
    assert (summary["end/status"], summary["warning/code"]) == ("done", "slow-disk")
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0, 0]


class Recording:
    """A tracker that keeps what it gets, and refuses as often as it is told."""

    run_id, where = "id", "here"

    def __init__(self):
        self.points, self.closed, self.refusals, self.config = [], [], 0, None

    def send(self, points):
        if self.refusals:
            self.refusals -= 1
            raise UserError("--to: no answer", "tracker-refuses")
        self.points += [(point.step, sorted(point.numbers)) for point in points if "train/loss" in point.numbers]

    def close(self, ended):
        self.closed.append(ended)


@pytest.fixture
def followed(monkeypatch, tmp_path):
    """`followed(*moments)`: follows tmp_path/run while each pause does the next of some things; exit code, tracker."""
    tracker = Recording()

    def opened(to, folder, config, project, run_id, offline):
        tracker.config = config
        return tracker

    monkeypatch.setattr(module, "open_tracker", opened)

    def run(*moments, code=0, refusals=0):
        left, tracker.refusals = list(moments), refusals
        monkeypatch.setattr(module.time, "sleep", lambda seconds: left.pop(0)())
        assert main(["follow", str(tmp_path / "run"), "--to", "mlflow"]) == code
        assert left == []
        return tracker

    return run


def test_it_waits_for_the_run_and_goes_with_it_to_its_end(tmp_path, followed, capsys):
    folder = tmp_path / "run"

    def begin():
        assert not folder.exists()
        write_run(folder, BEGUN[:1], {"status": "running", "pid": os.getpid()}, pictures=False)

    found = followed(
        begin,
        lambda: append(folder, *train(1, 2)),
        lambda: append(folder, *train(4), status="failed"),
    )
    assert [step for step, _ in found.points] == [1, 2, 4]
    assert found.points[0][1] == sorted(f"train/{key}" for key in train_line(1) if key not in ("kind", "step"))
    assert found.config["train"]["batch_size"] == 64
    assert found.closed == ["failed"]
    assert [line[:10].strip() for line in capsys.readouterr().out.splitlines()] == [
        *["waiting"] * 2, "follow", "followed"
    ]  # fmt: skip


def test_what_a_tracker_refuses_is_sent_again_and_nothing_is_lost(tmp_path, followed, capsys):
    """Also where the run has ended, here by a kill, and new lines have come meanwhile."""
    folder = write_run(tmp_path / "run", [*BEGUN, *train(1)], {"status": "running", "pid": os.getpid()}, pictures=False)
    found = followed(lambda: append(folder, *train(2), pid=2**22 + 1), lambda: None, refusals=2)
    assert ([step for step, _ in found.points], found.closed) == ([1, 2], ["killed"])
    assert capsys.readouterr().out.count("warning: --to: no answer") == 1


def test_ctrl_c_leaves_the_rest_to_the_next_start(tmp_path, followed, capsys):
    folder = write_run(tmp_path / "run", [*BEGUN, *train(1)], {"status": "running", "pid": os.getpid()}, pictures=False)

    def interrupt():
        raise KeyboardInterrupt

    assert followed(interrupt, code=130).closed == [None]
    append(folder, *train(2), status="done")
    found = followed()
    assert ([step for step, _ in found.points], found.closed) == ([1, 2], [None, "done"])


def test_a_long_log_that_was_sent_and_cut_back_hides_no_new_line(tmp_path, followed):
    """More of it than is read at once was sent before the resumption."""
    steps = range(4, 1001)
    folder = write_run(tmp_path / "run", [*BEGUN, *train(*steps)], {"status": "preempted"}, pictures=False)
    followed()
    (folder / "metrics.jsonl").unlink()
    again = [train_line(step, wall_seconds=9000.0 + step) for step in steps if step > 900]
    append(folder, *BEGUN, *train(*range(4, 901)), *again, *train(1001), status="done")
    found = followed()
    assert ([step for step, _ in found.points], found.closed) == ([*steps, 1001], ["preempted", "done"])


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [*BEGUN, *train(1)], pictures=False)
    assert refused("follow", tmp_path / "no/where", "--to", "wandb").code == "no-run-folder"
    for library in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, library, None)
        assert refused("follow", folder, "--to", library).code == f"no-{library}"
    with FileLock(folder / "follow-wandb.lock"):
        assert refused("follow", folder, "--to", "wandb").code == "followed"
    assert not list(folder.glob("follow*.json"))
