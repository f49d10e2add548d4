"""What the doctor finds out: control groups and file systems out of files made here, libraries that misbehave."""

import ast
import contextlib
import errno
import math
import tarfile
import tempfile
import types

import pytest
import torch

from fastsiam.data import read_speed
from fastsiam.doctor import facts, probe
from fastsiam.doctor.facts import Probe
from tests.support.processes import REPOSITORY

MEMINFO = "MemTotal: 16000000 kB\nMemFree: 1000 kB\nMemAvailable: 8000000 kB\n"


@pytest.fixture
def put(tmp_path):
    """A function that writes files below tmp_path, which stands for the root of the file system."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package importable, here and in the probes."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    return make


V1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/docker/a1\n5:memory:/docker/a1\n0::/\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
}
V2 = {"proc/self/cgroup": "0::/slurm/job/step\n", "sys/fs/cgroup/slurm/job/step/cpu.max": "max 100000\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        (V2, math.inf),
        (V2 | {"sys/fs/cgroup/slurm/job/cpu.max": "150000 100000\n"}, 1.5),
        (
            V2 | {"sys/fs/cgroup/slurm/job/cpu.max": "400000 100000", "sys/fs/cgroup/slurm/cpu.max": "100000 50000"},
            2.0,
        ),
        # A container's own view.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (V1, math.inf),
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000"}, 2.5),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/docker/a1/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/docker/a1/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
    ],
)
def test_the_tightest_quota_counts(put, files, cores):
    machine = facts.look_at_machine(put({"proc/meminfo": MEMINFO, **files}))
    assert machine.cores_quota == cores


@pytest.mark.parametrize(
    ("files", "available", "limited"),
    [
        ({}, 8000000 * 1024, False),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, 8000000 * 1024, False),
        (
            {
                "proc/self/cgroup": "0::/pod\n",
                "sys/fs/cgroup/pod/memory.max": "4000000000\n",
                "sys/fs/cgroup/pod/memory.current": "3000000000\n",
                "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 500000000\nactive_file 7\n",
            },
            1_500_000_000,
            True,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000000",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000000\n",
            },
            600_000_000,
            True,
        ),
        # v1 without a limit.
        (
            V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000000",
            },
            8000000 * 1024,
            False,
        ),
        ({"proc/meminfo": "MemTotal: 5 kB\n"}, math.inf, False),
    ],
)
def test_memory_is_what_the_system_and_the_groups_leave(put, files, available, limited):
    machine = facts.look_at_machine(put({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **files}))
    assert (machine.memory_available, machine.memory_limited) == (available, limited)
    assert machine.shared_memory_free is None


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
    """What `probe_torch` asks of torch for the second of two GPUs, whose computing is `compute`."""
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
    found = facts.look_at_run_folder(tmp_path / "not/yet")
    assert (found["folder"], found["error"]) == (str(tmp_path), None)
    assert found["free"] > 0
    assert not list(tmp_path.iterdir())

    def full(**_):
        raise OSError(errno.EDQUOT, "over quota")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert facts.look_at_run_folder(tmp_path)["error"] == "Disk quota exceeded"


MOUNTS = """
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /data rw shared:7 - nfs4 server:/data rw
31 30 0:41 / /data/local\\040disk rw - xfs /dev/nvme rw
34 30 0:44 / /data/tab\\011stop rw - btrfs /dev/nvme rw
32 22 0:42 / /home rw - ext4 /dev/vdb rw
33 22 0:43 / /home rw - fuse.sshfs host:/ rw
"""


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/data/imagenet", "nfs4"),
        ("/data", "nfs4"),
        ("/database", "ext4"),
        ("/data/local disk/x", "xfs"),
        ("/data/tab\tstop/x", "btrfs"),
        ("/home/me", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_path(path, filesystem):
    assert read_speed.filesystem_of(path, MOUNTS.strip()) == filesystem


def test_all_images_are_read_past_the_cache(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for number in range(20):
        (tmp_path / "a" / f"{number}.JPG").write_bytes(b"x" * (1000 + number))
    (tmp_path / "a" / "notes.txt").write_bytes(b"x" * 10**6)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    advice = []
    monkeypatch.setattr(read_speed.os, "posix_fadvise", lambda *given: advice.append(given[1:]))
    speed = read_speed.measure(tmp_path, threads=3, seconds=60.0)
    assert (speed.files, speed.num_bytes, speed.kind, speed.threads) == (20, 20 * 1000 + 190, "images", 3)
    assert speed.mean_image_bytes == pytest.approx(1009.5)
    assert advice == [(0, 0, read_speed.os.POSIX_FADV_DONTNEED)] * 20


def test_reading_ends_when_its_time_is_over(tmp_path, monkeypatch):
    """A clock that moves by a second a look: one thread begins 2 files of 3 MiB and comes to the second's middle."""
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(3 << 20))
    seconds = iter(range(1000))
    monkeypatch.setattr(read_speed.time, "perf_counter", lambda: float(next(seconds)))
    speed = read_speed.measure(tmp_path, threads=1, seconds=8.0)
    assert speed.files == 1
    assert 3 << 20 < speed.num_bytes < 6 << 20


def test_shards_count_by_their_images(tmp_path):
    for number, image in enumerate((2000, 4000)):
        (tmp_path / "image.jpg").write_bytes(bytes(image))
        (tmp_path / "label.cls").write_bytes(b"7")
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as tar:
            tar.add(tmp_path / "image.jpg", "k.jpg")
            tar.add(tmp_path / "image.jpg", "l.jpg")
            tar.add(tmp_path / "label.cls", "k.cls")
    (tmp_path / "image.jpg").unlink()
    speed = read_speed.measure(tmp_path, threads=2)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert (speed.files, speed.num_bytes, speed.kind) == (2, total, "shards")
    assert speed.mean_image_bytes in (2000, 4000)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    speed = read_speed.measure(tmp_path, threads=2)
    assert (speed.files, speed.num_bytes, speed.kind) == (0, 0, "nothing")
