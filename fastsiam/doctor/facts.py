"""Facts that the doctor judges: libraries, each asked in a process of its own, and what this process may use."""

import errno
import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastsiam.runtime.cores import control_groups, cpu_quota, read_fact, whole_cores

# Importing torch from a network file system for the first time takes a minute or more.
PROBE_SECONDS = 300
# What the line of a probe begins with that has its answer.
ANSWER = "fastsiam probe: "

# Import name, and what pip installs for it: install_requires of setup.py.
REQUIRED = {
    "torch": "torch>=2.11",
    "torchvision": "torchvision",
    "triton": "triton>=3.6",
    "numba": "numba>=0.61",
    "numpy": "numpy>=1.26",
    "PIL": "pillow",
    "pydantic": "pydantic>=2.7",
    "yaml": "pyyaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "pynvml": "nvidia-ml-py",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
}


@dataclass(frozen=True)
class Probe:
    """What a library said of itself (`fastsiam.doctor.probe`), or why it could not."""

    found: dict | None
    reason: str = ""


@dataclass(frozen=True)
class Machine:
    """What this process may use."""

    cores_seen: int
    """os.cpu_count()."""
    cores_allowed: int
    """By affinity."""
    cores_quota: float
    """By the control groups; inf without a quota."""
    memory_available: float
    """Bytes, of the system and of the control groups; inf where neither tells."""
    memory_limited: bool
    """Whether a control group allows less than the system has."""
    shared_memory_free: int | None
    """Bytes under /dev/shm; None where there is none."""
    open_files: int
    """The soft limit."""
    open_files_hard: int

    @property
    def cores(self) -> int:
        """Whole cores that this process may use, which is also what data.workers is by default."""
        return whole_cores(self.cores_allowed, self.cores_quota)


def ask(name: str, *arguments: str) -> Probe:
    """Run one probe with the sys.path of this process."""
    # -P: a folder of the library's name in the working directory counts only where it counts here.
    command = [sys.executable, "-P", "-m", "fastsiam.doctor.probe", name, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Probe(None, f"no answer within {PROBE_SECONDS} s")
    if done.returncode < 0:
        number = -done.returncode
        return Probe(None, f"it ended the process: {signal.strsignal(number) or f'signal {number}'}")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Probe(None, lines[-1] if lines else f"exit code {done.returncode}")
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    return Probe(json.loads(answers[0])) if answers else Probe(None, "it ended the process without an error")


def ask_all(probes: dict[str, tuple[str, ...]]) -> dict[str, Probe]:
    """Several probes at once, by name; most of their time is imports."""
    with ThreadPoolExecutor(max(2, min(4, len(os.sched_getaffinity(0))))) as pool:
        futures = {name: pool.submit(ask, *probe) for name, probe in probes.items()}
        return {name: future.result() for name, future in futures.items()}


def is_installed(name: str) -> bool:
    """Whether `import name` would find something; of `a.b` the package a is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def missing() -> list[str]:
    """Of `REQUIRED`, what pip would have to install."""
    return [requirement for name, requirement in REQUIRED.items() if not is_installed(name)]


def distributions(*prefixes: str) -> dict[str, str]:
    """Versions of the installed distributions whose name begins with one of `prefixes`."""
    found = {}
    for dist in importlib.metadata.distributions():
        # An interrupted uninstallation leaves folders without it; Pythons differ in what they make of that.
        if dist.read_text("METADATA") or dist.read_text("PKG-INFO"):
            name = (dist.metadata["Name"] or "").lower().replace("_", "-")
            if name.startswith(prefixes):
                found[name] = dist.version
    return found


def requirements(distribution: str) -> list[str]:
    """What an installed distribution requires; empty where it is not installed."""
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def c_compiler() -> str | None:
    """The one that Triton takes (triton/runtime/build.py)."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def missing_for_ffcv() -> list[str]:
    """Debian's names of what ffcv is built from and is not here; what pkg-config alone could tell, without it, is not.

    ffcv 1.0.2 reads the shell's "pkg-config: not found" as an answer, and names opencv.
    """
    if shutil.which("pkg-config") is None:
        return ["pkg-config"]
    needed = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
    return [package for name, package in needed.items() if subprocess.run(["pkg-config", "--exists", name]).returncode]


def has_python_headers() -> bool:
    scheme = sysconfig.get_default_scheme()
    # Where Debian's local scheme has them is the prefix's place; Triton looks there, too.
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"], "Python.h").is_file()


def look_at_machine(root: Path = Path("/")) -> Machine:
    """`root`: where proc and sys are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    system = _memory_available(root)
    group = _group_memory(root)
    shared = root / "dev/shm"
    return Machine(
        cores_seen=os.cpu_count() or 1,
        cores_allowed=len(os.sched_getaffinity(0)),
        cores_quota=cpu_quota(root),
        memory_available=min(system, group),
        memory_limited=group < system,
        shared_memory_free=shutil.disk_usage(shared).free if shared.is_dir() else None,
        open_files=soft,
        open_files_hard=hard,
    )


def look_at_run_folder(path: Path) -> dict:
    """`{"folder", "free", "error"}`: bytes free where `path` is or would be made, and why nothing can be written."""
    folder = next(parent for parent in (path, *path.absolute().parents) if os.path.isdir(parent))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        error = None
    except OSError as refusal:
        error = os.strerror(refusal.errno) if refusal.errno else str(refusal)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as refusal:
        free, error = 0, error or os.strerror(refusal.errno or errno.EIO)
    return {"folder": str(folder), "free": free, "error": error}


def _memory_available(root):
    for line in (read_fact(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _group_memory(root) -> float:
    """Bytes that the tightest memory group leaves; inactive file pages are given up before anything is killed."""
    left = math.inf
    for group in control_groups(root, "memory"):
        limit = read_fact(group / "memory.max") or read_fact(group / "memory.limit_in_bytes")
        used = read_fact(group / "memory.current") or read_fact(group / "memory.usage_in_bytes")
        if not limit or not used or limit == "max":
            continue
        inactive = 0
        for line in (read_fact(group / "memory.stat") or "").splitlines():
            key, _, value = line.partition(" ")
            # v1's total_ counts the groups below, as usage does.
            if key in ("inactive_file", "total_inactive_file"):
                inactive = int(value)
        left = min(left, int(limit) - int(used) + inactive)
    return max(left, 0)
