"""The wheel holds what the checkout holds, kernels and configs behind their symlinks included."""

import subprocess
import sys
import zipfile

import pytest

from tests.conftest import REPOSITORY

USE = """
import fastsiam, fastsiam.kernels, torch, pathlib
from fastsiam.config import CONFIGS, load_config
assert pathlib.Path(fastsiam.__file__).is_relative_to({site!r}), fastsiam.__file__
assert pathlib.Path(fastsiam.kernels.__file__).is_relative_to({site!r})
assert load_config("quickstart").run.name == "quickstart"
p, z = torch.randn(2, 4, 8, dtype=torch.float64)
loss = fastsiam.kernels.negative_cosine(p, p, p, p)
print(round(float(loss), 9), sorted(path.name for path in CONFIGS.glob("*.yaml")))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, as an index would."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPOSITORY)],
        check=True, capture_output=True,
    )  # fmt: skip
    assert len(list(out.glob("fastsiam-*.tar.gz"))) == 1
    (path,) = out.glob("fastsiam-*.whl")
    return path


def test_the_wheel_imports_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "fastsiam/kernels/reference.py" in names
    assert not [name for name in names if name.startswith(("kernels/", "configs/", "tests/"))]
    done = subprocess.run(
        [sys.executable, "-c", USE.format(site=str(site))],
        cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shipped = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))
    assert done.stdout.split(" ", 1) == ["-1.0", f"{shipped}\n"]
