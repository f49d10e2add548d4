"""The CPU cores that this process may use: by its affinity, and by the quotas of its control groups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """Whole cores for this process, at least 1."""
    return whole_cores(len(os.sched_getaffinity(0)), cpu_quota())


def threads_for(workers: int | None) -> int:
    """Decoding threads that `data.workers` stands for: all usable cores for None, at least one."""
    return usable_cores() if workers is None else max(1, workers)


def whole_cores(allowed: int, quota: float) -> int:
    """At most `allowed`, and no more threads than `quota` cores keep busy: others would wait for the next period."""
    return max(1, math.floor(min(allowed, quota)))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores of the tightest CPU quota on the way to the root, inf for none; cpu.max is cgroup v2, cpu.cfs_* v1."""
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
    """Folders of this process' control groups that have a controller, from its own up to the root."""
    for line in (read_fact(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        tops = ("cpu", "cpu,cpuacct", "cpuacct,cpu") if controller == "cpu" else (controller,)
        for top in tops if names else ("",):
            base = root / "sys/fs/cgroup" / top
            # In a container the path may be the host's, of which only the mount itself is seen.
            inside = base / path.lstrip("/")
            yield from (level for level in (inside, *inside.parents) if level.is_relative_to(base))


def read_fact(path: Path) -> str | None:
    """A small file of the kernel's; None where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
