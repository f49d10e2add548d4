"""`fastsiam doctor`: its output, its exit code, and that no broken library makes it crash."""

import json
import subprocess
import sys

import pytest

from fastsiam.doctor import __main__ as doctor
from fastsiam.doctor.lines import Line
from tests.support.processes import REPOSITORY, run_python
from tests.support.refusals import refused

NAMES = [
    "python", "packages", "torch", "torchvision", "driver", "gpu", "triton", "compilers", "dali", "ffcv", "backend",
    "apex", "pynvml", "pillow", "cores", "memory", "shared memory", "open files", "caches", "run folder",
]  # fmt: skip
LINES = [
    Line("ok", "ok", "pip install nvidia-dali-cuda120", name="dali"),
    Line("warning", "slow-disk", "slow [/photos] of \udcff", "move [it]", "data"),
]
ERROR = Line("error", "torch-fails", "cannot be imported", "pip install torch", "torch")


@pytest.fixture
def found(monkeypatch):
    """A function that sets the lines of all checks."""
    return lambda *lines: monkeypatch.setattr(doctor, "examine", lambda data: list(lines))


def test_each_line_has_its_status_and_what_to_do(found, capsys):
    found(*LINES)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok       dali  pip install nvidia-dali-cuda120",
        "warning  data  slow [/photos] of \\xff; cure: move [it] [slow-disk]",
        "errors: 0, warnings: 1",
    ]
    found(*LINES, ERROR)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "errors: 1, warnings: 1"


def test_json_has_the_same(found, capsys):
    found(*LINES, ERROR)
    assert doctor.main(["--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["errors"], printed["warnings"]) == (1, 1)
    assert [Line(**line) for line in printed["lines"]] == [*LINES, ERROR]


def test_a_folder_that_is_not_there_is_refused():
    error = refused("doctor", "no/photos")
    assert (error.key, error.code) == (None, "not-a-folder")


@pytest.mark.slow
def test_this_machine_is_well_enough(demo_folder):
    """Tests need what the doctor asks for: no check of software may be an error here."""
    done = run_python("-m", "fastsiam", "doctor", "--json", demo_folder / "train")
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    lines = {line["name"].replace("gpu 0", "gpu"): line for line in printed["lines"]}
    # Each GPU has a line of its own.
    assert [name for name in lines if not name.startswith("gpu ")] == [*NAMES, "data"]
    errors = [name for name, line in lines.items() if line["status"] == "error"]
    assert set(errors) <= {"run folder", "data"}
    assert (done.returncode, printed["errors"]) == (int(bool(errors)), len(errors))
    assert lines["python"]["text"] == ".".join(map(str, sys.version_info[:3]))


def test_a_broken_environment_is_described(tmp_path):
    """torch raises, triton ends the process, and two packages are not what their names say."""
    files = {
        "torch/__init__.py": "raise ImportError('torch is masked')",
        "triton/__init__.py": "import os; os.abort()",
        "apex/__init__.py": "raise SystemExit('another project runs')",
        "pynvml-11.5.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: pynvml\nVersion: 11.5.3\n",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    done = run_python("-m", "fastsiam.doctor", "--json", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.returncode == 1, done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    assert list(lines) == NAMES
    codes = {name: lines[name]["code"] for name in ("torch", "triton", "backend", "apex", "pynvml", "pillow")}
    assert codes == {
        "torch": "torch-fails", "triton": "triton-fails", "backend": "fastsiam-fails", "apex": "other-apex",
        "pynvml": "deprecated-pynvml", "pillow": "ok",
    }  # fmt: skip
    assert "ImportError: torch is masked" in lines["torch"]["text"]
    assert f"{tmp_path}/apex/__init__.py" in lines["apex"]["text"]


def test_without_any_package_it_names_what_to_install(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=120)
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-m", "fastsiam.doctor", "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    lines = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    assert lines["packages"]["cure"].startswith("pip install 'torch>=2.11' torchvision 'triton>=3.6'")
    assert lines["torch"]["code"] == "torch-fails"
    assert lines["memory"]["code"] == "ok"
