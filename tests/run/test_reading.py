"""Whether a run has ended, told from outside."""

import os
import subprocess
import sys

import pytest

from fastsiam.run.folder import RunFolder
from fastsiam.run.reading import check_is_run, check_may_begin, ending, has_begun
from tests.support.files import LONG_AGO
from tests.support.refusals import refuses
from tests.support.run_folders import run_folder


@pytest.fixture
def folder(tmp_path):
    made = run_folder(tmp_path)
    made.path.mkdir()
    return made


def ended(folder: RunFolder, **details):
    folder.set_status("running", **details)
    return ending(folder.path)


def test_a_run_has_ended_as_its_status_says(folder):
    assert ending(folder.path) is None
    for status in ("done", "preempted", "collapsed", "failed"):
        folder.set_status(status)
        assert ending(folder.path) == status


def test_a_running_run_is_killed_where_its_process_has_gone(folder):
    alive, gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE), subprocess.Popen(["true"])
    assert ended(folder, pid=alive.pid) is None
    assert ended(folder, pid=alive.pid, host=os.uname().nodename) is None
    # Its number belongs to a process that began after the status was written.
    os.utime(folder.path / "status.json", (LONG_AGO, LONG_AGO))
    assert ending(folder.path) == "killed"
    assert ended(folder) is None
    gone.wait()
    assert ended(folder, pid=gone.pid) == "killed"
    assert ended(folder, pid=gone.pid, host="another") is None
    alive.kill()
    # Nobody has waited for it: it is a zombie.
    os.waitid(os.P_PID, alive.pid, os.WEXITED | os.WNOWAIT)
    assert ended(folder, pid=alive.pid) == "killed"
    alive.wait()


def test_what_is_no_run_is_refused_and_what_may_become_one_is_waited_for(tmp_path):
    (tmp_path / "runs/one").mkdir(parents=True)
    check_may_begin(tmp_path / "runs/one")
    assert not has_begun(tmp_path / "runs/one")
    (tmp_path / "runs/one/config.yaml").write_text("")
    check_is_run(tmp_path / "runs/one")
    assert has_begun(tmp_path / "runs/one")
    check_may_begin(tmp_path / "runs/two")
    for wrong, code in (("runs", "not-a-run"), ("no/where", "no-run-folder")):
        for check in (check_is_run, check_may_begin):
            with refuses(code, "RUN"):
                check(tmp_path / wrong)
