"""The command line that the benchmarks share, and what all commands take for a path."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.harness.cli import command
from fastsiam import cli
from fastsiam.doctor import __main__ as doctor
from fastsiam.errors import UserError
from fastsiam.plan import __main__ as plan
from fastsiam.prepare import __main__ as prepare
from fastsiam.report import __main__ as report


def test_run_gets_what_the_command_line_says(tmp_path):
    calls = []

    def run(results, *, device, minutes, images=None):
        calls.append((results.folder, device, minutes, images))

    assert command(run, "x", "Time x.", 3.0, ["--device", "cpu"]) == 0
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.5", "--images", "photos"]
    assert command(run, "x", "Time x.", 3.0, arguments) == 0
    cpu = torch.device("cpu")
    assert calls == [(None, cpu, 3.0, None), (tmp_path, cpu, 0.5, Path("photos"))]
    with pytest.raises(SystemExit):
        command(run, "x", "Time x.", 3.0, ["--solo-learn", "there"])


def test_a_mistake_is_a_sentence(capsys):
    def run(results, *, device, minutes):
        raise UserError("--images: nothing there", code="no-jpegs")

    assert command(run, "x", "Time x.", 3.0, ["--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(" [no-jpegs]\n")


def test_a_tilde_is_the_home_folder_on_every_command_line(photos, tmp_path, monkeypatch, capsys):
    """Started without a shell, and in --out=~/x, which a shell leaves alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(photos, tmp_path / "photos")
    assert prepare.main(["scan", "~/photos", "--workers=0", "--out=~/found.tsv"]) == 0
    assert prepare.main(["pack", "~/photos", "~/packed"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "found.tsv", "packed"}
    capsys.readouterr()
    for main, arguments in (
        (report.main, ["~/none"]),
        (doctor.main, ["~/none"]),
        (plan.main, ["--config=quickstart", "data.train=~/none"]),
        (prepare.main, ["ffcv", "~/none", "~/x.beton"]),
        (prepare.main, ["cifar10", "~/none", "~/x"]),
    ):
        assert main(arguments) == 2
        assert f"{tmp_path}/none" in capsys.readouterr().err


def test_tensors_too_large_for_the_host_end_in_a_sentence(capsys):
    def too_large():
        torch.empty(10**15)

    assert cli.answered(too_large, gone="", stopped="") == 2
    assert capsys.readouterr().err.endswith(" [out-of-host-memory]\n")


def test_other_runtime_errors_stay_what_they_are():
    with pytest.raises(RuntimeError):
        cli.answered(lambda: torch.zeros(2).view(3), gone="", stopped="")
