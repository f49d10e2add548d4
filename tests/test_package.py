"""The wheel holds what the checkout holds, kernels and configs behind their symlinks included."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.support.processes import REPOSITORY

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


@pytest.mark.slow
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


FROM_THE_PARENT = """
import site
for folder in {folders!r}:
    site.addsitedir(folder)
import fastsiam, fastsiam.config.views, fastsiam.kernels
print(fastsiam.load_config("quickstart").run.name, fastsiam.__file__)
"""


@pytest.mark.slow
def test_an_editable_install_is_found_from_the_folder_above_the_clone(tmp_path):
    """There the clone's own folder, named as the package is, would be a namespace package, and data/ a part of it."""
    clone, site = tmp_path / "fastsiam", tmp_path / "site"
    for name in ("fastsiam", "kernels", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, clone / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, clone)
    (clone / "data/demo").mkdir(parents=True)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    # Without the site-packages at first: those of the tests have an editable install of their own.
    folders = [str(site), *(path for path in sys.path if path.endswith("site-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "-c", FROM_THE_PARENT.format(folders=folders)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["quickstart", str(clone / "fastsiam/__init__.py")]


def test_no_advice_names_a_package_that_no_index_has():
    """`pip install 'fastsiam[dali]'` finds another project or none: extras are for a clone, `-e '.[dali]'`."""
    for folder in ("fastsiam", "benchmarks", "kernels"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert "fastsiam[" not in path.read_text(), path
