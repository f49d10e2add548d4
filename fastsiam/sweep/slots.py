"""Places in which the runs of a sweep train side by side: a GPU each, or a share of the cores."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping

from fastsiam.config import Config
from fastsiam.runtime.cores import usable_cores

_COUNT = "import torch; print(torch.cuda.device_count())"


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the GPUs that torch sees, as CUDA_VISIBLE_DEVICES names them.

    torch counts them in a process of its own, and only where the driver has any.
    """
    if not _driver_has_gpus():
        return []
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    count = int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    return names[:count]


def environment_of(
    slot: int, at_once: int, devices: list[str], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Returns the environment of a run in slot 0, 1, ...: its GPU, and threads where several share the cores."""
    changed = dict(environment)
    if devices:
        changed["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    if at_once > 1:
        changed.setdefault("OMP_NUM_THREADS", str(_share_of_cores(at_once)))
    # The package may be on sys.path alone, which a process does not inherit.
    changed["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return changed


def overrides_of(config: Config, at_once: int) -> list[str]:
    """Returns the overrides of a run among several: its share of the decoding threads, unless the config has one."""
    if at_once == 1 or config.data.workers is not None:
        return []
    return [f"data.workers={_share_of_cores(at_once)}"]


def _share_of_cores(at_once):
    return max(1, usable_cores() // at_once)


def _driver_has_gpus():
    try:
        import pynvml
    except ImportError:
        return True
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            return pynvml.nvmlDeviceGetCount() > 0
        finally:
            pynvml.nvmlShutdown()
    return False
