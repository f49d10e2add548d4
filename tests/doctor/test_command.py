"""The command: what it prints, its exit code, and that nothing that is or is not installed makes it crash."""

import json
import subprocess
import sys

import pytest

from fastsiam.doctor import __main__ as doctor
from fastsiam.doctor.software import Line
from tests.support.processes import REPOSITORY, run_python

SOFTWARE = [
    "python", "packages", "torch", "torchvision", "driver", "gpu", "triton", "C compiler", "C++ compiler", "dali",
    "ffcv", "backend", "apex", "pynvml", "pillow",
]  # fmt: skip
MACHINE = ["cores", "memory", "shared memory", "open files", "caches", "run folder"]
LINES = [
    Line("ok", "dali", "not installed; pip install nvidia-dali-cuda120 for speed"),
    Line("warning", "data", "slow [/photos] of \udcff", "move [it]"),
]
ERROR = Line("error", "torch", "cannot be imported", "pip install torch")


@pytest.fixture
def found(monkeypatch):
    """A function that sets what the doctor finds."""
    return lambda *lines: monkeypatch.setattr(doctor, "examine", lambda data: list(lines))


def test_what_is_printed(found, capsys):
    found(*LINES)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == (
        "ok       dali  not installed; pip install nvidia-dali-cuda120 for speed\n"
        "warning  data  slow [/photos] of \\xff; cure: move [it]\n"
        "errors: 0, warnings: 1\n"
    )
    found(*LINES, ERROR)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith(
        "error    torch  cannot be imported; cure: pip install torch\nerrors: 1, warnings: 1\n"
    )


def test_json_says_the_same(found, capsys):
    found(*LINES, ERROR)
    assert doctor.main(["--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["errors"], said["warnings"]) == (1, 1)
    assert [Line(**line) for line in said["lines"]] == [*LINES, ERROR]


def test_a_folder_that_is_not_there_is_a_sentence(capsys):
    assert doctor.main(["no/photos"]) == 2
    assert capsys.readouterr().err == "fastsiam: DATA_FOLDER: no/photos is no folder; give one of images\n"


def test_this_machine_is_well_enough(demo_folder):
    """Tests need what the doctor asks for, so that here is no error of software."""
    done = run_python("-m", "fastsiam", "doctor", demo_folder / "train")
    assert "Traceback" not in done.stdout + done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    text = dict(zip(SOFTWARE, (rest for _, rest in rows), strict=False))
    names = [name for name in [*SOFTWARE, *MACHINE, "data"] if not any(rest.startswith(name) for _, rest in rows)]
    # Each GPU has a line of its own.
    assert names == []
    assert not [rest for status, rest in rows if status == "error" and rest.startswith(tuple(SOFTWARE))]
    assert done.returncode == (1 if any(status == "error" for status, _ in rows) else 0)
    assert text["python"].split()[1] == ".".join(map(str, sys.version_info[:3]))


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
    said = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    assert list(said) == [*SOFTWARE, *MACHINE]
    assert said["torch"]["text"] == "cannot be imported (ImportError: torch is masked)"
    assert said["triton"]["text"] == "cannot be imported (it ended the process: Aborted)"
    assert said["backend"]["status"] == "error"
    assert said["apex"]["text"] == f"{tmp_path}/apex/__init__.py belongs to another project of that name"
    assert (said["pynvml"]["status"], "pynvml 11.5.3" in said["pynvml"]["text"]) == ("warning", True)
    assert said["pillow"]["status"] == "ok"


def test_without_any_package_it_says_what_to_install(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=120)
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-m", "fastsiam.doctor"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == ""
    assert "cure: pip install 'torch>=2.11' torchvision 'triton>=3.6'" in done.stdout
    assert "error    torch          cannot be imported (ModuleNotFoundError: No module named 'torch')" in done.stdout
