"""Each judgement of the doctor, from facts made up here: every status and code that it can give."""

import json
import math

import pytest

from fastsiam.config import RunConfig, load_config
from fastsiam.data.read_speed import ReadSpeed
from fastsiam.doctor import facts, machine
from fastsiam.doctor import software as checks
from fastsiam.doctor.__main__ import RUNS
from fastsiam.doctor.facts import Probe
from fastsiam.doctor.lines import release, size
from fastsiam.doctor.software import has_kernels
from fastsiam.optim.apex import Apex
from tests.support.processes import REPOSITORY

FAILED = Probe(None, "OSError: libc is gone")
HERE = Probe({"version": "2.4.0"})
H100 = {
    "name": "NVIDIA H100", "capability": [9, 0], "memory": 80 * 10**9, "free": 79 * 10**9, "precision": "bf16",
    "error": None,
}  # fmt: skip
NVML = {"driver": "580.65", "cuda": [13, 0], "gpus": ["NVIDIA H100"], "error": None}
SPEED = ReadSpeed(1000, 110_000_000, 1.0, 8, 110e3, "ext4", "images")


def torch(**changes):
    found = {
        "version": "2.14.1+cu130", "cuda": "13.0", "hip": None, "cpu_precision": "fp32", "gpus": [], "cuda_error": None,
        "architectures": ["sm_75", "sm_80", "sm_90", "sm_100", "compute_120"],
    }  # fmt: skip
    return Probe(found | changes)


def nvml(**changes):
    return Probe(NVML | changes)


def no_driver(error="NVMLError_LibraryNotFound"):
    return Probe({"driver": None, "cuda": None, "gpus": [], "error": error, "text": "NVML's text"})


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


def driver(version, *cuda, torch_cuda="13.0"):
    return checks.check_driver(nvml(driver=version, cuda=list(cuda)), torch_cuda)


CUDA12, CUDA13 = {"nvidia-dali-cuda120": "2.4.0"}, {"nvidia-dali-cuda130": "2.4.0"}
INSTEAD = "pip uninstall -y nvidia-dali-cuda120 && pip install nvidia-dali-cuda130"
BOTH = "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130 && pip install nvidia-dali-cuda130"
NO_FFCV = Probe(None, "MissingLibraryError: data.backend: ffcv cannot be imported (libx)")

# A line, its status and code, and what must be in it: commands, settings and numbers.
SOFTWARE = {
    "python": (checks.check_python((3, 12, 1)), "ok", "3.12.1"),
    "old python": (checks.check_python((3, 10, 9)), "error old-python", "python3.11"),
    "packages": (checks.check_packages([]), "ok"),
    "missing packages": (
        checks.check_packages(["torch>=2.11", "rich"]), "error missing-packages", "pip install 'torch>=2.11' rich",
    ),
    "torch": (checks.check_torch(torch()), "ok", "CUDA 13.0"),
    "torch for CPUs": (checks.check_torch(torch(cuda=None)), "ok"),
    "oldest torch": (checks.check_torch(torch(version="2.11.0")), "ok"),
    "newest torch": (checks.check_torch(torch(version="2.15.3")), "ok"),
    "old torch": (checks.check_torch(torch(version="2.9.1")), "warning untested-torch", "'torch>=2.11,<2.16'"),
    "new torch": (checks.check_torch(torch(version="2.16.0a0")), "warning untested-torch", "'torch>=2.11,<2.16'"),
    "no torch": (checks.check_torch(FAILED), "error torch-fails", FAILED.reason),
    "torchvision": (checks.check_torchvision(Probe({"version": "0.29"})), "ok", "0.29"),
    "another torchvision": (checks.check_torchvision(FAILED), "error torchvision-fails", FAILED.reason),
    "driver": (driver("580.65", 13, 0), "ok", "580.65"),
    # Minor versions are compatible within a major one.
    "driver of an earlier minor": (driver("580.65", 13, 0, torch_cuda="13.2"), "ok"),
    "old driver": (driver("550.54", 12, 4), "error old-driver", "driver 580 or later"),
    "driver, torch for CPUs": (driver("470.1", 11, 4, torch_cuda=None), "ok", "11.4"),
    "no driver": (checks.check_driver(no_driver(), "13.0"), "ok"),
    "driver updated": (
        checks.check_driver(no_driver("NVMLError_LibRmVersionMismatch"), "13.0"), "error driver-fails", "NVML's text",
    ),
    "NVML fails": (checks.check_driver(FAILED, "13.0"), "warning nvml-fails", "nvidia-ml-py"),
    "gpu": (gpu(), "ok", "NVIDIA H100, 80 GB, compute capability 9.0, 79 GB free; train.precision=auto: bf16"),
    "gpu in use": (gpu(free=10**9), "warning gpu-in-use", "1 GB"),
    "gpu that fails": (gpu(error="device is busy", free=None), "error gpu-fails", "device is busy"),
    "gpu of before Volta": (gpu(capability=[6, 1]), "error old-gpu", "train.device=cpu"),
    "gpu that torch has dropped": (gpu(capability=[7, 0]), "error no-kernels", "sm_75"),
    "gpu by ROCm": (gpu({"hip": "6.4", "cuda": None}), "warning rocm", "train.device=cpu"),
    "no gpu": (no_gpu(no_driver()), "ok", "train.precision=auto: fp32"),
    "no gpu, NVML fails": (no_gpu(FAILED), "ok"),
    "hidden gpu": (no_gpu(nvml(), ""), "warning hidden-gpus", "unset CUDA_VISIBLE_DEVICES"),
    "gpu out of reach": (no_gpu(nvml(), "3", cuda_error="no GPUs"), "error gpus-out-of-reach", "no GPUs"),
    "gpu and torch for CPUs": (no_gpu(nvml(), cuda=None), "warning torch-without-cuda", "NVIDIA H100"),
    "gpu, no torch": (checks.check_gpus(FAILED, nvml(), None)[0], "ok"),
    "triton": (triton("3.8.0", "triton~=3.8.0"), "ok", "3.8.0"),
    "triton of a patch": (triton("3.5.1", "triton==3.5.0"), "ok", "3.5.1"),
    "triton, torch for CPUs": (triton("3.8.0", "", ptxas=None, gpu=False), "ok", "3.8.0"),
    "another triton": (triton("3.6.0", "triton~=3.8.0"), "warning other-triton", "pip install 'triton~=3.8.0'"),
    "no ptxas": (triton("3.8.0", "", ptxas=None), "error no-ptxas", "TRITON_PTXAS_PATH"),
    "no triton": (checks.check_triton(FAILED, "", False), "error triton-fails", "--force-reinstall 'triton'"),
    "compilers": (checks.check_compilers("/bin/gcc", True, "/bin/g++", True), "ok", "/bin/gcc and /bin/g++"),
    "no compilers": (checks.check_compilers(None, True, None, True), "error no-compiler", "install gcc g++ ("),
    "no headers": (checks.check_compilers("gcc", False, "g++", True), "error no-compiler", "install python3-dev ("),
    "no C++ compiler": (checks.check_compilers("gcc", True, None, True), "warning no-compiler", "install g++ ("),
    "no compilers, no gpu": (checks.check_compilers(None, False, None, False), "ok", "install gcc python3-dev g++"),
    "dali": (dali(CUDA13), "ok", "nvidia-dali-cuda130 2.4.0"),
    "no dali": (dali({}, None), "ok", "pip install nvidia-dali-cuda130"),
    "no dali, no gpu": (dali({}, None, driver=None), "ok", "pip install nvidia-dali-cuda120"),
    "no dali, CUDA 12": (dali({}, None, "12.8", 12), "ok", "pip install nvidia-dali-cuda120"),
    "no dali, torch for CUDA 12": (dali({}, None, "12.8", 13), "ok", "pip install nvidia-dali-cuda120"),
    "dali of another CUDA": (dali(CUDA12), "warning dali-of-other-cuda", INSTEAD),
    "dali of another CUDA, no gpu": (dali(CUDA12, driver=None), "ok", "nvidia-dali-cuda120 2.4.0"),
    "dali twice": (dali(CUDA12 | CUDA13), "error two-dalis", BOTH),
    "dali and a nightly": (dali(CUDA13 | {"nvidia-dali-nightly-cuda130": "3"}), "error two-dalis"),
    "dali that the driver does not know": (dali(CUDA13, driver=12), "error dali-of-newer-cuda", "nvidia-dali-cuda120"),
    "old dali": (dali({"nvidia-dali-cuda120": "1.37.1"}, torch_cuda="12.1"), "warning old-dali", "--upgrade"),
    "dali that fails": (dali(CUDA13, FAILED), "error dali-fails", "data.backend=pil"),
    "dali without its module": (dali(CUDA13, None), "error dali-fails", "data.backend=pil"),
    "ffcv": (checks.check_ffcv(Probe({"version": "1.0.2"})), "ok", "1.0.2"),
    "no ffcv": (checks.check_ffcv(None, ["pkg-config"]), "ok", "apt-get install pkg-config"),
    "ffcv that fails": (checks.check_ffcv(NO_FFCV), "warning ffcv-fails", "libx", "pip install --force-reinstall"),
    "backend": (checks.check_backend(Probe({"name": "pil", "reason": "auto: no"})), "ok", "pil (auto: no)"),
    "no backend": (checks.check_backend(FAILED), "error fastsiam-fails", FAILED.reason),
    "apex": (checks.check_apex(Apex("/x/apex/__init__.py", True)), "ok", "/x/apex/__init__.py"),
    "no apex": (checks.check_apex(None), "ok"),
    "another apex": (checks.check_apex(Apex("/x", False)), "warning other-apex", "uninstall apex"),
    "nvml": (checks.check_nvml_bindings({"nvidia-ml-py": "13.5"}), "ok", "nvidia-ml-py 13.5"),
    "no nvml": (checks.check_nvml_bindings({}), "ok"),
    "pynvml": (checks.check_nvml_bindings({"pynvml": "11.5"}), "warning deprecated-pynvml", "pip uninstall -y pynvml"),
    "pillow": (checks.check_pillow(Probe({"version": "12.0", "turbo": "3.1"})), "ok", "libjpeg-turbo 3.1"),
    "pillow-simd": (checks.check_pillow(Probe({"version": "9.5.0.post2", "turbo": None})), "ok", "Pillow-SIMD"),
    "no pillow": (checks.check_pillow(FAILED), "error pillow-fails", FAILED.reason),
}  # fmt: skip


def reading(cores=2, probe=None, **changes):
    return machine.check_reading("photos", probe or Probe(SPEED._replace(**changes)._asdict()), cores)


def shared_memory(free, backend="pil"):
    return machine.check_shared_memory(free, 8, backend)


SHARED = "warning little-shared-memory"
HARDWARE = {
    "cores": (machine.check_cores(8, 8, math.inf), "ok", "8 of 8; data.workers=8"),
    "quota": (machine.check_cores(8, 8, 2.5), "ok", "data.workers=2"),
    "small quota": (machine.check_cores(8, 8, 0.5), "ok", "data.workers=1"),
    "affinity": (machine.check_cores(8, 4, math.inf), "ok", "data.workers=4"),
    "memory": (machine.check_memory(64e9, math.inf), "ok", "64 GB"),
    "memory limit": (machine.check_memory(64e9, 1.5e9), "warning little-memory", "1.5 GB"),
    "memory not known": (machine.check_memory(math.inf, math.inf), "ok"),
    "shared memory": (shared_memory(32 * 2**30), "ok", "34.4 GB"),
    # Docker's default.
    "little shared memory": (shared_memory(64 << 20), SHARED, "2.47 GB", "--shm-size=3g"),
    "shared memory for 3 workers": (shared_memory(10**9), SHARED, "data.workers=3"),
    "little shared memory, dali": (shared_memory(0, "dali"), "ok"),
    "no shared memory": (shared_memory(None), SHARED, "data.workers=0"),
    "open files": (machine.check_open_files(20_000, 20_000), "ok"),
    "few open files": (machine.check_open_files(256, 20_000), "warning few-open-files", "ulimit -n 4096"),
    "few and no more": (machine.check_open_files(256, 512), "warning few-open-files", "nofile=4096"),
    "few of any number": (machine.check_open_files(256, -1), "warning few-open-files", "ulimit -n 4096"),
    "run folder": (machine.check_run_folder("/here", 10**12, None), "ok", "1 TB"),
    "full disk": (machine.check_run_folder("/here", 10**9, None), "warning little-disk", "run.dir=FOLDER"),
    "read-only": (machine.check_run_folder("/here", 10**12, "no"), "error run-folder-not-writable", "run.dir=FOLDER"),
    "data": (reading(), "ok", "1,000 images/s of 110 kB; the cores decode about 719"),
    # Between the 719 images/s of the committed result and the 374 of the first prototype.
    "slow data": (reading(num_bytes=55_000_000), "warning slow-disk", "fastsiam prepare pack"),
    "slow for more cores": (reading(cores=8), "warning slow-disk", "2,876"),
    # 40 times as large, decoded 40 times as slowly.
    "large photographs": (reading(mean_image_bytes=4.4e6), "ok", "25 images/s of 4.4 MB; the cores decode about 18"),
    "thumbnails": (reading(mean_image_bytes=2e3), "ok", "55,000 images/s of 2 kB; the cores decode about 7,190"),
    "shards": (reading(kind="shards", files=0), "ok"),
    "slow shards": (reading(kind="shards", num_bytes=10**6), "warning slow-disk"),
    "no images": (reading(kind="nothing", num_bytes=0), "error no-images", "data.train"),
    "unreadable images": (reading(num_bytes=0, files=0), "error unreadable-images", "prepare scan photos"),
    "reading fails": (reading(probe=FAILED), "error data-not-measured", FAILED.reason),
}  # fmt: skip


@pytest.mark.parametrize("case", [*SOFTWARE, *HARDWARE])
def test_a_judgement(case):
    line, judged, *texts = {**SOFTWARE, **HARDWARE}[case]
    assert judged == ("ok" if line.code == "ok" else f"{line.status} {line.code}")
    assert (line.status == "ok") == (line.cure == "") == (line.code == "ok")
    for text in texts:
        assert text in f"{line.text}; {line.cure}"
    assert "\n" not in line.text + line.cure
    assert "pip install apex" not in line.cure


def test_the_rate_of_decoding_is_that_of_the_committed_result():
    results = (REPOSITORY / "benchmarks/results/2026-11-24_epyc-2-cores/loader.jsonl").read_text().splitlines()
    rows = [
        row for row in map(json.loads, results) if row["variant"] == "dali matrix" and row["params"]["workers"] == 2
    ]
    assert round(rows[0]["images_per_second"]) == 2 * machine.IMAGES_A_CORE


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


def test_the_numbers_are_those_of_the_configs():
    config = load_config("r50_100ep")
    assert config.train.batch_size * 2 * 3 * config.views[0].size ** 2 == machine.PIL_BATCH
    assert str(RUNS) == RunConfig().dir


def test_what_ffcv_is_built_from_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.missing_for_ffcv() == ["pkg-config"]
    fake = tmp_path / "pkg-config"
    fake.write_text('#!/bin/sh\n[ "$2" = opencv4 ]\n')
    fake.chmod(0o755)
    assert facts.missing_for_ffcv() == ["libturbojpeg0-dev"]


def test_caches_that_cannot_be_kept_have_their_cause(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "file").write_text("")
    for place, its_home, chosen, code in (
        (home / ".cache/fastsiam", home, None, "ok"),
        (tmp_path / "tmp", None, None, "no-home"),
        (tmp_path / "tmp", home, None, "home-not-writable"),
        (tmp_path / "file/fastsiam", home, "x", "cache-not-writable"),
    ):
        assert machine.check_caches(place, its_home, chosen).code == code
