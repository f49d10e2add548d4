"""A run folder that cannot be made, and one on a disk that is full."""

import json

import pytest

from fastsiam.run.checkpoint import load_newest, save
from tests.support.files import largest_file
from tests.support.refusals import refuses
from tests.support.run_folders import run_folder
from tests.support.runs import lines


@pytest.mark.parametrize("fresh", ["false", "true"])
@pytest.mark.parametrize("place", ["below a file", "/proc/runs", "/tmp/" + 300 * "n"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, place, fresh):
    (tmp_path / "below a file").write_text("")
    with refuses("run-folder-unwritable", "run.dir"):
        folder = run_folder(tmp_path, **{"run.dir": tmp_path / place, "run.fresh": fresh})
        folder.check_is_ours()
        folder.open({})


def test_a_start_without_space_leaves_nothing_that_hinders_the_next(tmp_path):
    folder = run_folder(tmp_path)
    with largest_file(100), refuses("run-folder-unwritable"):
        folder.open({})
    folder.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    # A kill while config.yaml is written leaves this.
    (tmp_path / "run/config.yaml.tmp").write_text("data:")
    folder = run_folder(tmp_path)
    folder.check_is_ours()
    folder.open({})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "environment.json", "lock"]
    folder.close()


@pytest.fixture
def recorded(tmp_path):
    """A run folder with a header and a line, and the warnings that it has given (each also a line, as in a run)."""
    said = []

    def warn(sentence):
        said.append(sentence)
        folder.write({"kind": "warning", "message": sentence})

    folder = run_folder(tmp_path, warn)
    folder.open({})
    folder.write_header()
    folder.write({"kind": "train", "step": 1})
    return folder, said


def steps(folder):
    return [line.get("step", line["kind"]) for line in lines(folder.path)]


def test_metrics_wait_for_a_disk_that_is_full_and_none_is_cut_or_lost(recorded):
    folder, said = recorded
    whole = folder.metrics_path.read_bytes()
    with largest_file(len(whole) + 10):
        for step in (2, 3, 4):
            folder.write({"kind": "train", "step": step})
            assert folder.metrics_path.read_bytes() == whole
    assert [notice.code for notice in said] == ["disk-refuses"]
    folder.write({"kind": "train", "step": 5})
    assert steps(folder) == ["header", 1, 2, "warning", 3, 4, 5]
    with largest_file(folder.metrics_path.stat().st_size + 10):
        folder.write({"kind": "train", "step": 6})
    assert len(said) == 2
    folder.close()
    assert steps(folder)[-3:] == [5, 6, "warning"]


def test_lines_that_fit_are_written_before_one_that_does_not(recorded):
    folder, _ = recorded
    with largest_file(folder.metrics_path.stat().st_size):
        folder.write({"kind": "train", "step": 2})
    line = json.dumps({"kind": "train", "step": 2}) + "\n"
    with largest_file(folder.metrics_path.stat().st_size + len(line) + 1):
        folder.write({"kind": "train", "step": 3})
        assert steps(folder) == ["header", 1, 2]
    folder.close()
    assert steps(folder) == ["header", 1, 2, "warning", 3]


def test_lines_that_are_lost_at_the_end_are_told(recorded):
    folder, said = recorded
    with largest_file(folder.metrics_path.stat().st_size):
        folder.write({"kind": "train", "step": 2})
        folder.close()
    assert len(said) == 2
    assert "2 lines" in said[1]
    assert steps(folder) == ["header", 1]


@pytest.mark.parametrize("written_later", [True, False])
def test_a_checkpoint_remembers_the_lines_that_waited(recorded, tmp_path, written_later):
    """Resuming gives each line up to the checkpoint and none after, whether or not the disk took them meanwhile."""
    folder, _ = recorded
    with largest_file(folder.metrics_path.stat().st_size + 10):
        folder.write({"kind": "train", "step": 2})
        size = folder.metrics_path.stat().st_size
        remembered = folder.metrics_state()
        assert remembered["size"] == size
        assert [json.loads(line)["kind"] for line in remembered["pending"]] == ["train", "warning"]
        if not written_later:
            folder._metrics.pending = []
    folder.write({"kind": "train", "step": 3})
    folder.close()
    save(tmp_path, {"metrics": remembered}, keep=1)
    for _ in range(2):
        again = run_folder(tmp_path)
        again.open({})
        again.restore_metrics(load_newest(tmp_path, pytest.fail)["metrics"])
        again.write({"kind": "train", "step": 30})
        again.close()
        assert steps(again) == ["header", 1, 2, "warning", 30]


def test_a_status_that_cannot_be_written_leaves_the_one_before(recorded):
    folder, said = recorded
    folder.set_status("running", pid=1)
    with largest_file(10):
        folder.set_status("done", step=7)
    assert folder.status() == {"status": "running", "pid": 1}
    assert said[0].code == "disk-refuses"
    assert not (folder.path / "status.json.tmp").exists()
    folder.set_status("done", step=7)
    assert folder.status() == {"status": "done", "step": 7}
