"""Facts that the doctor gathers: memory of control groups made here, libraries that misbehave."""

import ast
import contextlib
import errno
import math
import sys
import tempfile
import types

import pytest
import torch

from fastsiam.doctor import facts, probe
from fastsiam.doctor.facts import Probe
from tests.support.processes import REPOSITORY


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package importable, here and in the probes."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    return make


V1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/docker/a1\n5:memory:/docker/a1\n0::/\n",
}
V2_MEMORY = {
    "proc/self/cgroup": "0::/pod\n",
    "sys/fs/cgroup/pod/memory.max": "4000000000\n",
    "sys/fs/cgroup/pod/memory.current": "3000000000\n",
    "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 500000000\nactive_file 7\n",
}
V1_MEMORY = V1 | {
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000000",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000000\n",
}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, math.inf),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, math.inf),
        (V2_MEMORY, 1_500_000_000),
        (V1_MEMORY, 600_000_000),
        (V2_MEMORY | {"sys/fs/cgroup/pod/memory.current": "5000000000\n"}, 0),
    ],
)
def test_memory_is_what_the_groups_leave(put, files, left):
    assert facts.group_memory(put({"proc/self/cgroup": "0::/\n", **files})) == left


def test_memory_of_the_system_is_not_known_without_psutil(monkeypatch):
    assert 0 < facts.system_memory() < 1e15
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert facts.system_memory() == math.inf


@pytest.mark.parametrize(
    ("source", "probe"),
    [
        ("print('noise', end='')\n__version__ = '1.2'", Probe({"version": "1.2"})),
        ("import os\nos.abort()", Probe(None, "it ended the process: Aborted")),
        ("import os\nos._exit(0)", Probe(None, "it ended the process without an error")),
        ("import os\nos._exit(7)", Probe(None, "exit code 7")),
        ("raise OSError('libnv.so: cannot open')", Probe(None, "OSError: libnv.so: cannot open")),
        ("x = 1", Probe(None, "AttributeError: module 'odd' has no attribute '__version__'")),
    ],
)
def test_whatever_an_import_does_is_an_answer(package, source, probe):
    package("odd", source)
    assert facts.ask("module", "odd") == probe


def test_the_working_directory_counts_only_where_it_counts_here(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text("__version__ = '1.2'")
    monkeypatch.chdir(tmp_path)
    assert facts.ask("module", "odd") == Probe(None, "ModuleNotFoundError: No module named 'odd'")
    monkeypatch.syspath_prepend("")
    assert facts.ask("module", "odd").found == {"version": "1.2"}


def test_an_import_that_hangs_is_an_answer(package, monkeypatch):
    package("odd", "import time\ntime.sleep(600)")
    monkeypatch.setattr(facts, "PROBE_SECONDS", 1)
    assert facts.ask("module", "odd") == Probe(None, "no answer within 1 s")


PYNVML = """
class NVMLError(Exception): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
def nvmlInit(): {init}
def nvmlSystemGetCudaDriverVersion_v2(): return 12040
def nvmlSystemGetDriverVersion(): return "550.54.15"
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return "NVIDIA L4"
"""


def test_what_nvml_says(package):
    package("pynvml", PYNVML.format(init="pass"))
    gpus = ["NVIDIA L4", "NVIDIA L4"]
    assert facts.ask("nvml").found == {"driver": "550.54.15", "cuda": [12, 4], "gpus": gpus, "error": None}
    package("pynvml", PYNVML.format(init="raise NVMLError_DriverNotLoaded('Driver Not Loaded')"))
    found = facts.ask("nvml").found
    assert (found["error"], found["text"], found["gpus"]) == ("NVMLError_DriverNotLoaded", "Driver Not Loaded", [])


def card(compute):
    """Stands in for torch with two GPUs, of which the second computes `compute`."""
    properties = types.SimpleNamespace(name="NVIDIA L4", major=8, minor=9, total_memory=24 * 10**9)
    cuda = types.SimpleNamespace(
        get_device_properties=lambda index: {1: properties}[index],
        device=lambda index: contextlib.nullcontext(index),
        mem_get_info=lambda: (20 * 10**9, 24 * 10**9),
    )
    device = lambda *given: given  # noqa: E731
    return types.SimpleNamespace(cuda=cuda, ones=compute, device=device)


def test_a_gpu_is_asked_to_compute():
    asked = []

    def precision(wanted, device):
        asked.append((wanted, device))
        return torch.bfloat16

    def busy(*_, **__):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might ...")

    ones = lambda count, device: torch.ones(count)  # noqa: E731
    found = probe._gpu(card(ones), precision, 1)
    assert asked[-1] == ("auto", ("cuda", 1))
    assert found == {
        "name": "NVIDIA L4", "capability": [8, 9], "memory": 24 * 10**9, "free": 20 * 10**9, "precision": "bf16",
        "error": None,
    }  # fmt: skip
    found = probe._gpu(card(busy), precision, 1)
    assert found["error"] == "CUDA error: all CUDA-capable devices are busy or unavailable"


def test_distributions_by_name(put, monkeypatch):
    def metadata(name, version):
        return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    root = put(
        {
            "a-1.dist-info/METADATA": metadata("nvidia_dali_cuda120", "2.4.0"),
            "b-1.dist-info/METADATA": metadata("nvidia-dali-nightly-cuda130", "3.0"),
            "c-1.dist-info/METADATA": metadata("nvidia-nccl", "2.3"),
            # Left behind by an uninstallation.
            "~d-1.dist-info/RECORD": "",
        }
    )
    monkeypatch.setattr("sys.path", [str(root)])
    assert facts.distributions("nvidia-dali") == {
        "nvidia-dali-cuda120": "2.4.0",
        "nvidia-dali-nightly-cuda130": "3.0",
    }
    assert facts.requirements("fastsiam") == []


def test_what_is_required_is_what_setup_installs():
    calls = [node for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())) if isinstance(node, ast.Call)]
    keywords = {keyword.arg: keyword.value for call in calls for keyword in call.keywords}
    assert sorted(facts.REQUIRED.values()) == sorted(ast.literal_eval(keywords["install_requires"]))
    assert facts.missing() == []


def test_a_module_in_a_packages_place_is_not_installed(package):
    package("notapackage", "")
    assert not facts.is_installed("notapackage.part")
    assert not facts.is_installed("nothing.part")
    assert facts.is_installed("json.decoder")


def test_the_run_folder_is_tried_where_it_would_be_made(tmp_path, monkeypatch):
    folder, free, error = facts.look_at_run_folder(tmp_path / "not/yet")
    assert (folder, error) == (str(tmp_path), None)
    assert free > 0
    assert not list(tmp_path.iterdir())

    def full(**_):
        raise OSError(errno.EDQUOT, "over quota")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert facts.look_at_run_folder(tmp_path)[2] == "Disk quota exceeded"
