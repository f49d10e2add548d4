"""What `pytest -m gpu` writes down, shown with tests that need no GPU."""

import json

import pytest

pytest_plugins = ("pytester",)

PLUGIN = """
import pytest, torch
from pathlib import Path
from tests.support.gpu_record import GpuRecord

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: as in the project")
    config.pluginmanager.register(GpuRecord(Path(__file__).parent / "results", torch.device("cpu")))
"""
TESTS = """
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("decoder", ["dali 2.4.0 (mixed decoder, 16 threads)", "pil 13.0.0 (no workers)"])
def test_decoder(decoder, record_property):
    record_property("decoder", decoder)

def test_wrong():
    assert False

@pytest.fixture
def broken():
    yield
    raise RuntimeError

def test_broken_at_the_end(broken):
    pass

@pytest.mark.skip
def test_left_out():
    pass
"""


@pytest.fixture
def run(pytester):
    """A function that runs the tests above with more arguments, and gives the files below results/."""
    pytester.makeconftest(PLUGIN)
    pytester.makepyfile(test_here=TESTS)

    def files(*arguments):
        pytester.inline_run("-q", "-p", "no:cacheprovider", "-m", "gpu", *arguments)
        return sorted((pytester.path / "results").rglob("*.*"))

    return files


def test_counts_and_decoders_of_the_whole_suite(run):
    for _ in range(2):
        (path,) = run()
    assert path.parent.name.endswith("_cpu")
    (text,) = path.read_text().splitlines()
    line = json.loads(text)
    found = {key: line[key] for key in ("benchmark", "passed", "failed", "skipped", "mixed_decoding")}
    assert found == {"benchmark": "gpu_tests", "passed": 2, "failed": 2, "skipped": 1, "mixed_decoding": True}
    assert path.suffix == (".jsonl" if line["environment"]["dirty"] is False else ".dirty")


@pytest.mark.parametrize("selection", [("-k", "wrong"), ("test_here.py",), ("-m", "not gpu")])
def test_a_selection_leaves_nothing(run, selection):
    assert run(*selection) == []
