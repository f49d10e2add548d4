"""The command line that the benchmarks share."""

from pathlib import Path

import pytest
import torch

from benchmarks.command import command
from fastsiam.config import UserError


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
        raise UserError("--images: nothing there")

    assert command(run, "x", "Time x.", 3.0, ["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "benchmarks: --images: nothing there\n"
