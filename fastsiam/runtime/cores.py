"""CPU cores that this process may use, by its affinity and by the quotas of its control groups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """Returns the whole cores for this process, at least 1."""
    return whole_cores(len(os.sched_getaffinity(0)), cpu_quota())


def threads_for(workers: int | None) -> int:
    """Returns the decoding threads that `data.workers` asks for, at least 1; None asks for all usable cores."""
    return usable_cores() if workers is None else max(1, workers)


def whole_cores(allowed: int, quota: float) -> int:
    """Returns at most `allowed`, and no more than `quota`: further threads would wait for the quota's next period."""
    return max(1, math.floor(min(allowed, quota)))


def cpu_quota(root: Path = Path("/")) -> float:
    """Returns the cores of the tightest CPU quota of the control groups, v2 (cpu.max) or v1 (cpu.cfs_*); inf: none."""
    cores = math.inf
    for group in control_groups(root, "cpu"):
        if text := read_fact(group / "cpu.max"):
            quota, period = text.split()
            if quota != "max":
                cores = min(cores, int(quota) / int(period))
        elif text := read_fact(group / "cpu.cfs_quota_us"):
            period = read_fact(group / "cpu.cfs_period_us")
            if int(text) > 0 and period:
                cores = min(cores, int(text) / int(period))
    return cores


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's control groups that have a controller, from its own up to the root."""
    for line in (read_fact(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        tops = ("cpu", "cpu,cpuacct", "cpuacct,cpu") if controller == "cpu" else (controller,)
        for top in tops if names else ("",):
            base = root / "sys/fs/cgroup" / top
            # In a container the path may be one of the host, of which only the mount itself is visible.
            inside = base / path.lstrip("/")
            yield from (level for level in (inside, *inside.parents) if level.is_relative_to(base))


def read_fact(path: Path) -> str | None:
    """Returns the text of a small file of the kernel; None where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
