"""Facts that the doctor judges: libraries, each asked in a process of its own, and what this process may use."""

import errno
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastsiam.runtime.cores import control_groups, read_fact

# Importing torch from a network file system for the first time takes a minute or more.
PROBE_SECONDS = 300
# Begins the line of a probe's output that has its answer.
ANSWER = "fastsiam probe: "

# Import name, and what pip installs for it: install_requires of setup.py.
REQUIRED = {
    "torch": "torch>=2.11", "torchvision": "torchvision", "triton": "triton>=3.6", "numba": "numba>=0.61",
    "numpy": "numpy>=1.26", "PIL": "pillow", "pydantic": "pydantic>=2.7", "yaml": "pyyaml", "rich": "rich",
    "safetensors": "safetensors", "pynvml": "nvidia-ml-py", "tensorboard": "tensorboard", "matplotlib": "matplotlib",
    "filelock": "filelock", "jinja2": "jinja2", "psutil": "psutil",
}  # fmt: skip


class Probe(NamedTuple):
    """Answer of a library about itself (`fastsiam.doctor.probe`), or the reason why there is none."""

    found: dict | None
    reason: str = ""


def ask_libraries() -> dict[str, Probe]:
    """Asks all libraries that are installed, several at once: most of the time is imports."""
    wanted = {name: (name,) for name in ("torch", "nvml", "triton", "backend", "pillow")}
    wanted |= {"dali": ("module", "nvidia.dali")} if is_installed("nvidia.dali") else {}
    wanted |= {"ffcv": ("ffcv",)} if is_installed("ffcv") else {}
    with ThreadPoolExecutor(max(2, min(4, len(os.sched_getaffinity(0))))) as pool:
        futures = {name: pool.submit(ask, *probe) for name, probe in wanted.items()}
        probes = {name: future.result() for name, future in futures.items()}
    # Importing torchvision takes seconds, and fastsiam's own modules have done it.
    backend = probes["backend"].found
    probes["torchvision"] = Probe({"version": backend["torchvision"]}) if backend else ask("module", "torchvision")
    return probes


def ask(name: str, *arguments: str) -> Probe:
    """Runs one probe with the sys.path of this process."""
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


def is_installed(name: str) -> bool:
    """Returns True where `import name` would find something; of `a.b` the package a is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def missing() -> list[str]:
    """Returns the requirements of `REQUIRED` that are not installed."""
    return [requirement for name, requirement in REQUIRED.items() if not is_installed(name)]


def distributions(*prefixes: str) -> dict[str, str]:
    """Returns the versions of the installed distributions whose names begin with one of `prefixes`."""
    found = {}
    for dist in importlib.metadata.distributions():
        # An interrupted uninstallation leaves folders without it; Pythons differ in what they make of that.
        if dist.read_text("METADATA") or dist.read_text("PKG-INFO"):
            name = (dist.metadata["Name"] or "").lower().replace("_", "-")
            if name.startswith(prefixes):
                found[name] = dist.version
    return found


def requirements(distribution: str) -> list[str]:
    """Returns the requirements of a distribution; empty where it is not installed."""
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def missing_for_ffcv() -> list[str]:
    """Returns Debian's names of missing packages that ffcv is built from; only pkg-config where that is missing.

    ffcv 1.0.2 reads the shell's "pkg-config: not found" as an answer, and names opencv.
    """
    if shutil.which("pkg-config") is None:
        return ["pkg-config"]
    needed = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
    return [package for name, package in needed.items() if subprocess.run(["pkg-config", "--exists", name]).returncode]


def has_python_headers() -> bool:
    scheme = sysconfig.get_default_scheme()
    # Debian's local scheme has them where the prefix's scheme has them; Triton looks there.
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"], "Python.h").is_file()


def look_at_run_folder(path: Path) -> tuple[str, int, str | None]:
    """Returns the folder in which `path` is or would be made, bytes free there, and why nothing can be written."""
    folder = next(parent for parent in (path, *path.absolute().parents) if os.path.isdir(parent))
    free, reason = 0, None
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as refusal:
        reason = os.strerror(refusal.errno or errno.EIO)
    return str(folder), free, reason


def free_shared_memory() -> int | None:
    """Returns the bytes free in /dev/shm; None where there is none."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None


def system_memory() -> float:
    """Returns the bytes of memory that are available on this machine; inf where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return math.inf
    return psutil.virtual_memory().available


def group_memory(root: Path = Path("/")) -> float:
    """Returns the bytes that the tightest memory group leaves, inf without a limit; `root` has proc and sys.

    Inactive file pages count as free: the kernel gives them up before it kills anything.
    """
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
