"""The tests where ffcv, DALI, playwright or Chromium is missing: all collected, some skipped, none in the way."""

import json
import re

import pytest

from tests.support import optional
from tests.support.processes import REPOSITORY, run_python

# `python -c WITHOUT '["ffcv", ...]' ARGUMENT ...`: pytest with these arguments, where those modules cannot be found.
WITHOUT = """
import importlib.machinery, json, os, sys
hidden, find = set(json.loads(sys.argv[1])), importlib.machinery.PathFinder.find_spec

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in hidden else find(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "-n0", *sys.argv[2:]]))
"""
# Each test starts a pytest of its own.
pytestmark = pytest.mark.slow

EVERYTHING = ("ffcv", "cv2", "nvidia.dali", "playwright")


def without(modules, *arguments, **environment):
    done = run_python("-c", WITHOUT, json.dumps(modules), *arguments, **environment)
    return done.returncode, done.stdout + done.stderr


def test_every_test_is_collected_where_they_are_missing():
    """Checks -m gpu, the documented command: its machines mostly lack these libraries."""
    code, printed = without(EVERYTHING, "--collect-only", "-q", "-m", "gpu")
    assert code == 0, printed[-2000:]
    (chosen, all_of_them) = re.search(r"^(\d+)/(\d+) tests collected", printed, re.MULTILINE).groups()
    assert int(chosen) >= 25
    assert int(all_of_them) > 1500


SKIPPED = {
    "test_crops_of_the_same_pixels_are_pils_within_one_level": "ffcv",
    "test_the_same_seed_gives_the_same_order_and_boxes[ffcv]": "ffcv",
    "test_dalis_graph_has_one_decoder_for_all_groups[dali]": "dali",
    "test_bad_files_take_no_memory": "dali",
    "test_names_from_outside_stay_text": "playwright",
}


def address(test):
    """The test with its file, in whichever folder that lies."""
    name = test.partition("[")[0]
    (path,) = (path for path in (REPOSITORY / "tests").rglob("test_*.py") if f"def {name}(" in path.read_text())
    return f"{path}::{test}"


def test_a_test_without_its_library_is_skipped_and_says_what_installs_it():
    other = "test_draws_of_further_views_are_spread_as_those_of_the_first"
    code, printed = without(EVERYTHING, "-q", *map(address, (*SKIPPED, other)))
    assert code == 0, printed[-2000:]
    for test, library in SKIPPED.items():
        name = re.escape(test.partition("[")[0])
        assert re.search(rf"^SKIPPED .*\b{name} needs {library}: pip install \S+", printed, re.MULTILINE), printed
    assert re.search(r"^1 passed, \d skipped", printed, re.MULTILINE), printed


def test_an_error_other_than_a_missing_library_fails(monkeypatch):
    """Errors of a library that is installed are not a reason to skip."""
    monkeypatch.setattr(optional, "installed", lambda library: library != "ffcv")
    assert optional.missing(ModuleNotFoundError("no", name="ffcv")) == "ffcv"
    assert optional.missing(ModuleNotFoundError("no", name="nvidia.dali")) is None
    assert optional.missing(ModuleNotFoundError("no", name="fastsiam.data.backends.ffcv")) is None
    assert optional.missing(ImportError("no name")) is None
    assert optional.missing(None) is None
    monkeypatch.setattr(optional, "installed", lambda library: False)
    assert optional.missing(ModuleNotFoundError("no", name="nvidia")) == "dali"
    wrapped = ImportError("says what to install")
    wrapped.__cause__ = ModuleNotFoundError("no", name="ffcv")
    assert optional.missing(wrapped) == "ffcv"


def test_without_chromium_and_a_compiler_their_tests_are_skipped(tmp_path):
    """A PATH without any, and no download of playwright's own."""
    tests = map(
        address, ("test_names_from_outside_stay_text", "test_inductor_compiles_one_graph_that_steps_as_the_module_does")
    )
    code, printed = without((), "-q", *tests, PATH=str(tmp_path), PLAYWRIGHT_BROWSERS_PATH=str(tmp_path))
    assert code == 0, printed[-2000:]
    assert "playwright install chromium" in printed
    assert "test_inductor_compiles_one_graph_that_steps_as_the_module_does needs g++: apt-get install" in printed
