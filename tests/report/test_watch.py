"""The page of a run that is watched: rewritten for new lines, until the run has ended."""

import json
import os

import pytest

from fastsiam.report.__main__ import main
from tests.support.refusals import refused
from tests.support.run_folders import train_line, write_run


def state(folder, status, text=None, **details):
    (folder / "status.json").write_text(json.dumps({"status": status, **details}))
    if text is not None:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(text)


@pytest.fixture
def watched(monkeypatch, capsys):
    """`watched(folder, *moments)`: watches while each pause does the next of some things; returns pages and output."""

    def run(folder, *moments, seconds="7"):
        left, pages = list(moments), []

        def sleep(pause):
            assert pause == float(seconds)
            page = folder / "report.html"
            pages.append((page.read_text(), page.stat().st_ino) if page.exists() else None)
            left.pop(0)()

        monkeypatch.setattr("fastsiam.report.watch.time.sleep", sleep)
        capsys.readouterr()
        assert main([str(folder), "--watch", seconds]) == 0
        assert left == []
        return [*pages, ((folder / "report.html").read_text(), None)], capsys.readouterr().out

    return run


def test_the_page_follows_the_log_from_before_the_run_to_its_end(tmp_path, watched):
    folder = tmp_path / "run"
    line = json.dumps(train_line(2, loss=-0.25))

    def begin():
        write_run(folder, [train_line(1, loss=-0.125)], pictures=False)
        state(folder, "running", line[:9], pid=os.getpid())

    pages, said = watched(
        folder,
        begin,
        lambda: None,
        lambda: state(folder, "running", line[9:] + "\n", pid=os.getpid()),
        lambda: state(folder, "done"),
    )
    assert pages[0] is None
    for (page, _), loss, reloads in zip(
        pages[1:], ("−0.1250", "−0.1250", "−0.2500", "−0.2500"), (1, 1, 1, 0), strict=True
    ):
        assert loss in page
        assert page.count('<meta http-equiv="refresh" content="7">') == page.count("http-equiv") == reloads
    # The same file: nothing was written where the log had nothing new.
    assert pages[1][1] == pages[2][1] != pages[3][1]
    assert [line[:10].strip() for line in said.splitlines()] == ["watching", "waiting", "report"]
    assert said.endswith("(the run has ended: done)\n")


def test_a_killed_run_ends_the_watching(tmp_path, watched):
    folder = write_run(tmp_path / "run", [train_line(1)], {"status": "running", "pid": 2**22 + 1}, pictures=False)
    (folder / "metrics.jsonl").unlink()
    pages, said = watched(folder)
    assert "metrics.jsonl has no numbers yet" in pages[0][0]
    assert "http-equiv" not in pages[0][0]
    assert said.endswith("(the run has ended: killed)\n")


def test_what_cannot_be_watched_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", pictures=False)
    assert refused("report", folder, folder, "--watch").code == "watch-of-several"
    assert refused("report", folder, "--watch", "0").code == "bad-seconds"
    assert refused("report", tmp_path / "no/where", "--watch").code == "no-run-folder"
    assert not (folder / "report.html").exists()
