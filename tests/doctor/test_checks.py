"""Each judgement of the doctor, from facts made up here: every status that it can give."""

import dataclasses
import math

import pytest

from fastsiam.config import RunConfig, load_config
from fastsiam.data.read_speed import ReadSpeed, is_network
from fastsiam.doctor import facts
from fastsiam.doctor import machine as machines
from fastsiam.doctor import software as checks
from fastsiam.doctor.__main__ import RUNS
from fastsiam.doctor.facts import Machine, Probe
from fastsiam.doctor.software import has_kernels, release, size
from fastsiam.optim.apex import Apex

FAILED = Probe(None, "OSError: libc is gone")
HERE = Probe({"version": "2.4.0"})
GIB = 2**30
H100 = {
    "name": "NVIDIA H100", "capability": [9, 0], "memory": 80 * 10**9, "free": 79 * 10**9, "precision": "bf16",
    "error": None,
}  # fmt: skip
NVML = {"driver": "580.65", "cuda": [13, 0], "gpus": ["NVIDIA H100"], "error": None}
MACHINE = Machine(8, 8, math.inf, 64e9, False, 32 * GIB, 20000, 20000)
SPEED = ReadSpeed(1000, 110_000_000, 1.0, 8, 110e3, "ext4", "images")


def torch(**changes):
    found = {
        "version": "2.14.1+cu130", "cuda": "13.0", "hip": None, "cpu_precision": "fp32", "gpus": [], "cuda_error": None,
        "architectures": ["sm_75", "sm_80", "sm_90", "sm_100", "compute_120"],
    }  # fmt: skip
    return Probe(found | changes)


def nvml(**changes):
    return Probe(NVML | changes)


def no_driver(error="NVMLError_LibraryNotFound", text="NVML Shared Library Not Found"):
    return Probe({"driver": None, "cuda": None, "gpus": [], "error": error, "text": text})


def gpu(torch_changes=None, **changes):
    (line,) = checks.check_gpus(torch(gpus=[H100 | changes], **(torch_changes or {})), nvml(), None)
    return line


def no_gpu(nvml_probe, visible=None, **torch_changes):
    (line,) = checks.check_gpus(torch(**torch_changes), nvml_probe, visible)
    return line


def dali(installed, probe=HERE, torch_cuda="13.0", driver=13):
    return checks.check_dali(installed, probe, torch_cuda, driver)


def triton(version, requirement, ptxas="/bin/ptxas", gpu=True):
    return checks.check_triton(Probe({"version": version, "ptxas": ptxas}), requirement, gpu)


CUDA12, CUDA13 = {"nvidia-dali-cuda120": "2.4.0"}, {"nvidia-dali-cuda130": "2.4.0"}
INSTEAD = "pip uninstall -y nvidia-dali-cuda120 && pip install nvidia-dali-cuda130"

# A line, its status, what its text has, and what its cure has.
SOFTWARE = {
    "python": (checks.check_python((3, 12, 1)), "ok", "3.12.1", ""),
    "old python": (checks.check_python((3, 10, 9)), "error", "3.10.9 is older than 3.11", "python3.11"),
    "packages": (checks.check_packages([]), "ok", "installed", ""),
    "missing packages": (
        checks.check_packages(["torch>=2.11", "nvidia-ml-py"]), "error", "not installed: torch, nvidia-ml-py",
        "pip install 'torch>=2.11' nvidia-ml-py",
    ),
    "torch": (checks.check_torch(torch()), "ok", "2.14.1+cu130, built for CUDA 13.0", ""),
    "torch for CPUs": (checks.check_torch(torch(cuda=None)), "ok", "built for CPUs only", ""),
    "oldest torch": (checks.check_torch(torch(version="2.11.0")), "ok", "2.11.0", ""),
    "newest torch": (checks.check_torch(torch(version="2.15.3")), "ok", "2.15.3", ""),
    "old torch": (checks.check_torch(torch(version="2.9.1")), "warning", "2.9.1", "pip install 'torch>=2.11,<2.16'"),
    "new torch": (checks.check_torch(torch(version="2.16.0a0")), "warning", "tried are 2.11 to 2.15", "<2.16"),
    "no torch": (checks.check_torch(FAILED), "error", "(OSError: libc is gone)", "torch torchvision"),
    "torchvision": (checks.check_torchvision(Probe({"version": "0.29"})), "ok", "0.29", ""),
    "another torchvision": (checks.check_torchvision(FAILED), "error", "beside this torch", "torch torchvision"),
    "driver": (checks.check_driver(nvml(), "13.0"), "ok", "NVIDIA 580.65, for CUDA up to 13.0", ""),
    # Minor versions are compatible within a major one.
    "driver of an earlier minor": (checks.check_driver(nvml(), "13.2"), "ok", "580.65", ""),
    "old driver": (
        checks.check_driver(nvml(driver="550.54", cuda=[12, 4]), "13.0"), "error",
        "550.54, for CUDA up to 12.4, is too old for torch's CUDA 13.0",
        "install driver 580 or later, or a torch built for CUDA 12",
    ),
    "driver, torch for CPUs": (checks.check_driver(nvml(cuda=[11, 4]), None), "ok", "11.4", ""),
    "no driver": (checks.check_driver(no_driver(), "13.0"), "ok", "no NVIDIA driver here", ""),
    "driver updated": (
        checks.check_driver(no_driver("NVMLError_LibRmVersionMismatch", "RM version mismatch"), "13.0"), "error",
        "(RM version mismatch)", "restart the machine",
    ),
    "NVML fails": (checks.check_driver(FAILED, "13.0"), "warning", "libc is gone", "nvidia-ml-py"),
    "gpu": (
        gpu(), "ok", "NVIDIA H100, 80 GB, compute capability 9.0, 79 GB free; train.precision=auto: bf16", "",
    ),
    "gpu in use": (gpu(free=10**9), "warning", "1 GB free", "nvidia-smi"),
    "gpu that fails": (gpu(error="device is busy", free=None), "error", "(device is busy)", "nvidia-smi"),
    "gpu of before Volta": (gpu(capability=[6, 1]), "error", "6.1; Triton needs 7.0", "train.device=cpu"),
    "gpu that torch has dropped": (gpu(capability=[7, 0]), "error", "torch was built for sm_75", "another build"),
    "gpu by ROCm": (gpu({"hip": "6.4", "cuda": None}), "warning", "ROCm", "train.device=cpu"),
    "no gpu": (no_gpu(no_driver()), "ok", "none; trains on the CPU (train.precision=auto: fp32)", ""),
    "no gpu, NVML fails": (no_gpu(FAILED), "ok", "none; trains on the CPU", ""),
    "hidden gpu": (no_gpu(nvml(), ""), "warning", "CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
    "allotted gpu out of reach": (
        no_gpu(nvml(), "3", cuda_error="no GPUs"), "error", "CUDA_VISIBLE_DEVICES='3' (no GPUs)", "nvidia-smi",
    ),
    "gpu and torch for CPUs": (no_gpu(nvml(), cuda=None), "warning", "built without CUDA", "built for CUDA"),
    "gpu out of reach": (
        no_gpu(nvml(), cuda_error="driver too old"), "error",
        "NVML sees NVIDIA H100, torch none; trains on the CPU (train.precision=auto: fp32) (driver too old)", "driver",
    ),
    "gpu, no torch": (checks.check_gpus(FAILED, nvml(), None)[0], "ok", "NVML sees 1; what torch sees", ""),
    "triton": (triton("3.8.0", "triton~=3.8.0"), "ok", "3.8.0, as torch wants", ""),
    "triton of a patch": (triton("3.5.1", "triton==3.5.0"), "ok", "3.5.1", ""),
    "triton, torch for CPUs": (triton("3.8.0", None, ptxas=None, gpu=False), "ok", "3.8.0", ""),
    "another triton": (
        triton("3.6.0", "triton~=3.8.0"), "warning", "3.6.0, where torch wants 3.8.0", "pip install 'triton~=3.8.0'",
    ),
    "no ptxas": (triton("3.8.0", None, ptxas=None), "error", "without ptxas", "TRITON_PTXAS_PATH"),
    "no triton": (checks.check_triton(FAILED, None, False), "error", "libc is gone", "--force-reinstall 'triton'"),
    "C compiler": (checks.check_c_compiler("/usr/bin/gcc", True, True), "ok", "/usr/bin/gcc", ""),
    "no C compiler": (checks.check_c_compiler(None, True, True), "error", "nor clang", "apt-get install gcc"),
    "no headers": (checks.check_c_compiler("gcc", False, True), "error", "Python.h is missing", "python3-dev"),
    "no C compiler, no gpu": (checks.check_c_compiler(None, False, False), "ok", "on GPUs only", ""),
    "C++ compiler": (checks.check_cxx_compiler(torch(inductor={"cxx": "g++"})), "ok", "g++, for train.compile=on", ""),
    "no C++ compiler": (checks.check_cxx_compiler(torch(inductor={"cxx": None})), "ok", "apt-get install g++", ""),
    "no Inductor": (checks.check_cxx_compiler(torch(inductor={"error": "no x"})), "warning", "(no x)", "compile=off"),
    "C++ compiler, no torch": (checks.check_cxx_compiler(FAILED), "ok", "not known", ""),
    "dali": (dali(CUDA13), "ok", "nvidia-dali-cuda130 2.4.0", ""),
    "no dali": (dali({}, None), "ok", "pip install nvidia-dali-cuda130", ""),
    "no dali, no gpu": (dali({}, None, driver=None), "ok", "pip install nvidia-dali-cuda120", ""),
    "no dali, CUDA 12": (dali({}, None, "12.8", 12), "ok", "pip install nvidia-dali-cuda120", ""),
    "no dali, torch for CUDA 12": (dali({}, None, "12.8", 13), "ok", "pip install nvidia-dali-cuda120", ""),
    "dali of another CUDA": (dali(CUDA12), "warning", "brings CUDA 12 and torch CUDA 13 into one process", INSTEAD),
    "dali of another CUDA, no gpu": (dali(CUDA12, driver=None), "ok", "nvidia-dali-cuda120 2.4.0", ""),
    "dali twice": (
        dali(CUDA12 | CUDA13), "error", "nvidia-dali-cuda120 and nvidia-dali-cuda130 share one import path",
        "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130 && pip install nvidia-dali-cuda130",
    ),
    "dali and a nightly": (dali(CUDA13 | {"nvidia-dali-nightly-cuda130": "3"}), "error", "share one import", "pip"),
    "dali that the driver does not know": (dali(CUDA13, driver=12), "error", "needs CUDA 13", "nvidia-dali-cuda120"),
    "old dali": (dali({"nvidia-dali-cuda120": "1.37.1"}, torch_cuda="12.1"), "warning", "older than 1.51", "--upgrade"),
    "dali that fails": (dali(CUDA13, FAILED), "error", "libc is gone", "data.backend=pil"),
    "dali without its module": (dali(CUDA13, None), "error", "no module nvidia.dali", "data.backend=pil"),
    "ffcv": (checks.check_ffcv(Probe({"version": "1.0.2"})), "ok", "1.0.2", ""),
    "no ffcv": (checks.check_ffcv(None), "ok", "pip install ffcv setuptools", ""),
    "ffcv that fails": (
        checks.check_ffcv(Probe(None, "MissingLibraryError: data.backend: ffcv cannot be imported (libx)")),
        "warning", "cannot be imported (libx)", "apt-get install libopencv-dev libturbojpeg0-dev",
    ),
    "backend": (
        checks.check_backend(Probe({"name": "pil", "reason": "auto: no"})), "ok", "takes pil (auto: no)", "",
    ),
    "no backend": (checks.check_backend(FAILED), "error", "libc is gone", "lines above"),
    "apex": (checks.check_apex(Apex("/x/apex/__init__.py", True)), "ok", "NVIDIA's, /x/apex/__init__.py", ""),
    "no apex": (checks.check_apex(None), "ok", "not installed", ""),
    "another apex": (checks.check_apex(Apex("/x", False)), "warning", "/x belongs to another", "uninstall apex"),
    "nvml": (checks.check_nvml_bindings({"nvidia-ml-py": "13.5"}), "ok", "nvidia-ml-py 13.5", ""),
    "no nvml": (checks.check_nvml_bindings({}), "ok", "not installed", ""),
    "pynvml": (
        checks.check_nvml_bindings({"nvidia-ml-py": "13.5", "pynvml": "11.5"}), "warning", "pynvml 11.5",
        "pip uninstall -y pynvml",
    ),
    "pillow": (checks.check_pillow(Probe({"version": "12.0", "turbo": "3.1"})), "ok", "12.0, libjpeg-turbo 3.1", ""),
    "pillow-simd": (
        checks.check_pillow(Probe({"version": "9.5.0.post2", "turbo": None})), "ok", "(Pillow-SIMD), a libjpeg", "",
    ),
    "no pillow": (checks.check_pillow(FAILED), "error", "libc is gone", "pillow"),
}  # fmt: skip


def machine(**changes):
    return dataclasses.replace(MACHINE, **changes)


def reading(cores=2, probe=None, **changes):
    return machines.check_reading("photos", probe or Probe(SPEED._replace(**changes)._asdict()), cores)


HARDWARE = {
    "cores": (machines.check_cores(MACHINE), "ok", "8 of 8; data.workers=8 by default", ""),
    "quota": (
        machines.check_cores(machine(cores_quota=2.5)), "ok",
        "2.5 of 8, by a quota of the container; data.workers=2 by default", "",
    ),
    "small quota": (machines.check_cores(machine(cores_quota=0.5)), "ok", "0.5 of 8, by a quota", ""),
    "affinity": (
        machines.check_cores(machine(cores_allowed=4)), "ok",
        "4 of 8, by the affinity of the process; data.workers=4 by default", "",
    ),
    "memory": (machines.check_memory(MACHINE), "ok", "64 GB available", ""),
    "memory limit": (
        machines.check_memory(machine(memory_available=1.5e9, memory_limited=True)), "warning",
        "1.5 GB available, by a limit of the container", "raise the limit",
    ),
    "memory that nobody tells": (machines.check_memory(machine(memory_available=math.inf)), "ok", "not known", ""),
    "shared memory": (machines.check_shared_memory(MACHINE, "pil"), "ok", "34.4 GB free in /dev/shm", ""),
    # Docker's default.
    "little shared memory": (
        machines.check_shared_memory(machine(shared_memory_free=64 << 20), "pil"), "warning",
        "67.1 MB free in /dev/shm; data.backend=pil with 8 workers takes 2.47 GB of it",
        "--shm-size=3g, or set data.workers=0",
    ),
    "shared memory for 3 workers": (
        machines.check_shared_memory(machine(shared_memory_free=10**9), "pil"), "warning", "1 GB", "data.workers=3",
    ),
    "little shared memory, dali": (
        machines.check_shared_memory(machine(shared_memory_free=0), "dali"), "ok", "0 kB free", "",
    ),
    "no shared memory": (
        machines.check_shared_memory(machine(shared_memory_free=None), "pil"), "warning", "no /dev/shm", "workers=0",
    ),
    "open files": (machines.check_open_files(MACHINE), "ok", "up to 20,000", ""),
    "few open files": (machines.check_open_files(machine(open_files=256)), "warning", "256", "ulimit -n 4096"),
    "few and no more": (
        machines.check_open_files(machine(open_files=256, open_files_hard=512)), "warning", "256", "nofile=4096",
    ),
    "few of any number": (
        machines.check_open_files(machine(open_files=256, open_files_hard=-1)), "warning", "256", "ulimit -n 4096",
    ),
    "run folder": (machines.check_run_folder("/here", 10**12, None), "ok", "1 TB free in /here", ""),
    "full disk": (machines.check_run_folder("/here", 10**9, None), "warning", "1 GB free in /here", "run.dir=FOLDER"),
    "read-only": (machines.check_run_folder("/here", 10**12, "Read-only"), "error", "Read-only", "run.dir"),
    "data": (
        reading(), "ok",
        "110 MB/s, 1,000 files/s with 8 threads on ext4: enough for 1,000 images/s of 110 kB; "
        "the cores decode about 374",
        "",
    ),
    "slow data": (
        reading(num_bytes=11_000_000, files=100, filesystem="nfs4"), "warning",
        "11 MB/s, 100 files/s with 8 threads on nfs4, a network file system: enough for 100 images/s", "prepare pack",
    ),
    "slow for more cores": (reading(cores=8), "warning", "the cores decode about 1,496", "a local disk"),
    # 40 times as large, decoded 40 times as slowly.
    "large photographs": (reading(mean_image_bytes=4.4e6), "ok", "25 images/s of 4.4 MB; the cores decode about 9", ""),
    "thumbnails": (reading(mean_image_bytes=2e3), "ok", "55,000 images/s of 2 kB; the cores decode about 3,740", ""),
    "shards": (reading(kind="shards", files=0), "ok", "110 MB/s of tar shards with 8 threads", ""),
    "slow shards": (reading(kind="shards", num_bytes=10**6), "warning", "1 MB/s of tar shards", "a local disk"),
    "no images": (reading(kind="nothing", num_bytes=0), "error", "no tar shards under photos", "data.train"),
    "unreadable images": (reading(num_bytes=0, files=0), "error", "none could be read", "prepare scan photos"),
    "reading fails": (reading(probe=FAILED), "error", "libc is gone", "lines above"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*SOFTWARE, *HARDWARE])
def test_a_judgement(case):
    line, status, text, cure = {**SOFTWARE, **HARDWARE}[case]
    assert line.status == status
    assert text in line.text
    assert cure in line.cure
    if status == "ok":
        assert line.cure == ""
    else:
        assert line.cure
    assert "\n" not in line.text + line.cure
    assert "pip install apex" not in line.cure


def test_every_gpu_has_its_line():
    broken = H100 | {"error": "Xid 79", "free": None}
    lines = checks.check_gpus(torch(gpus=[H100, broken]), nvml(), "0,1")
    assert [(line.name, line.status) for line in lines] == [("gpu 0", "ok"), ("gpu 1", "error")]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_120"], (12, 0), True),
        ([], (8, 0), False),
    ],
)
def test_which_builds_run_on_a_gpu(architectures, capability, runs):
    assert has_kernels(architectures, capability) is runs


def test_versions_and_sizes():
    assert [release(text) for text in ("2.14.1+cu130", "2.16.0a0+git1", "13", "3.8")] == [
        (2, 14, 1), (2, 16, 0), (13,), (3, 8),
    ]  # fmt: skip
    assert [size(n) for n in (0, 64e3, 1.5e6, 2.469e9, 3e12)] == ["0 kB", "64 kB", "1.5 MB", "2.47 GB", "3 TB"]


def test_network_file_systems():
    names = ("nfs4", "lustre", "9p", "fuse.sshfs", "fuse.gcsfuse", "ext4", "overlay", "tmpfs", "fuse.fuse-overlayfs")
    assert [name for name in names if is_network(name)] == ["nfs4", "lustre", "9p", "fuse.sshfs", "fuse.gcsfuse"]


def test_the_numbers_are_those_of_the_configs():
    config = load_config("r50_100ep")
    assert config.train.batch_size * 2 * 3 * config.views.size**2 == machines.PIL_BATCH
    assert str(RUNS) == RunConfig().dir


def test_what_ffcv_is_built_from_is_named(monkeypatch, tmp_path):
    assert "apt-get install pkg-config" in checks.check_ffcv(None, ["pkg-config"]).text
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.missing_for_ffcv() == ["pkg-config"]
    fake = tmp_path / "pkg-config"
    fake.write_text('#!/bin/sh\n[ "$2" = opencv4 ]\n')
    fake.chmod(0o755)
    assert facts.missing_for_ffcv() == ["libturbojpeg0-dev"]


def test_caches_that_cannot_be_kept_have_their_cause(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    kept = machines.check_caches(home / ".cache/fastsiam", home, None)
    assert (kept.status, kept.cure) == ("ok", "")
    lost = machines.check_caches(tmp_path / "tmp", None, None)
    assert (lost.status, "no home folder" in lost.text, "NUMBA_CACHE_DIR" in lost.cure) == ("warning", True, True)
    assert f"{home} (HOME) cannot be written" in machines.check_caches(tmp_path / "tmp", home, None).text
    (tmp_path / "file").write_text("")
    assert "file/fastsiam cannot be written" in machines.check_caches(tmp_path / "file/fastsiam", home, "x").text
