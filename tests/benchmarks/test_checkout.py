"""The commit that a result line names: from git, or where a copy has no .git from the file COMMIT beside its code."""

import shutil
import subprocess

import pytest

from benchmarks.harness.checkout import checkout_state


@pytest.fixture
def checkout(tmp_path):
    """A clean checkout with code, a link, an ignored log and a result file."""
    root = tmp_path / "checkout"
    (root / "code").mkdir(parents=True)
    (root / "code/one.py").write_text("1\n")
    (root / "kernels").symlink_to("code")
    (root / ".gitignore").write_text("*.log\nCOMMIT\n")
    for command in ("git init -q", "git add .", "git -c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(command.split(), cwd=root, check=True)
    (root / "run.log").write_text("ignored")
    results = root / "benchmarks/results/2026-01-01_here"
    results.mkdir(parents=True)
    (results / "loss.jsonl").write_text("{}\n")
    return root


@pytest.fixture
def copy(checkout, tmp_path):
    """The same without .git, and with COMMIT as the docstring says that it is written."""
    subprocess.run("{ git rev-parse HEAD; git ls-tree -r HEAD; } > COMMIT", shell=True, cwd=checkout, check=True)
    return shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns(".git"))


def test_dirty_is_what_the_commit_would_not_give_back(checkout, copy):
    clean = checkout_state(checkout)
    assert clean["dirty"] is False
    assert len(clean["commit"]) == 40
    for tree in (checkout, copy):
        assert checkout_state(tree) == clean
        (tree / "code/new.py").write_text("2\n")
        assert checkout_state(tree) == {**clean, "dirty": True}
        (tree / "code/new.py").unlink()
        (tree / "code/one.py").write_text("2\n")
        assert checkout_state(tree) == {**clean, "dirty": True}
        (tree / "code/one.py").unlink()
        assert checkout_state(tree) == {**clean, "dirty": True}
        (tree / "code/one.py").write_text("1\n")
        (tree / "kernels").unlink()
        (tree / "kernels").symlink_to("benchmarks")
        assert checkout_state(tree) == {**clean, "dirty": True}


def test_git_comes_first_and_without_either_nothing_is_said(checkout, copy, monkeypatch, tmp_path):
    (checkout / "COMMIT").write_text("0" * 40 + "\n")
    told = checkout_state(checkout)["commit"]
    assert told == checkout_state(copy)["commit"] != "0" * 40
    (copy / "COMMIT").unlink()
    assert checkout_state(copy) == {"commit": None, "dirty": None}
    (copy / "COMMIT").write_text("")
    assert checkout_state(copy) == {"commit": None, "dirty": None}
    # .git is there, and no git to read it with.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout_state(checkout)["commit"] == "0" * 40
