"""The doctor's judgements on the machine: cores, memory, limits, disks; each a function of facts."""

import math
from pathlib import Path

from fastsiam.data.read_speed import ReadSpeed, is_network
from fastsiam.doctor.facts import Machine, Probe
from fastsiam.doctor.software import Line, size
from fastsiam.runtime.cache_dirs import can_hold

# Importing torch, torchvision and the kernels takes 0.8 GB.
LEAST_MEMORY = 2e9
LEAST_OPEN_FILES = 1024
# ResNet-50: 38 million parameters and their momentum, three checkpoints (checkpoint.keep and the one being written).
LEAST_DISK = 2e9
# A batch of r50_100ep.yaml, uint8; a DataLoader's worker holds two (its prefetch_factor).
PIL_BATCH = 512 * 2 * 3 * 224 * 224
PIL_AHEAD = 2
# DALI on two CPU cores decodes and crops 374 photographs of ImageNet a second, of 110 kB on average.
DECODED_A_CORE, PHOTOGRAPH = 374 / 2, 110e3
# Below that size an image costs more than its bytes.
_SMALL = 10


def check_cores(machine: Machine) -> Line:
    usable = min(machine.cores_allowed, machine.cores_quota)
    limited = ""
    if usable < machine.cores_seen:
        limited = ", by " + (
            "a quota of the container" if machine.cores_quota < machine.cores_allowed else "the affinity of the process"
        )
    text = f"{usable:.3g} of {machine.cores_seen}{limited}; data.workers={machine.cores} by default"
    return Line("ok", "cores", text)


def check_memory(machine: Machine) -> Line:
    if math.isinf(machine.memory_available):
        return Line("ok", "memory", "not known")
    limited = ", by a limit of the container" if machine.memory_limited else ""
    text = f"{size(machine.memory_available)} available{limited}"
    if machine.memory_available < LEAST_MEMORY:
        return Line("warning", "memory", f"{text}; torch alone takes 0.8 GB", "end other processes, or raise the limit")
    return Line("ok", "memory", text)


def check_shared_memory(machine: Machine, backend: str | None) -> Line:
    """Batches of data.backend=pil's workers come through /dev/shm; nothing else does."""
    free, name = machine.shared_memory_free, "shared memory"
    needed = machine.cores * PIL_AHEAD * PIL_BATCH
    text = "no /dev/shm" if free is None else f"{size(free)} free in /dev/shm"
    uses = f"data.backend=pil with {machine.cores} workers takes {size(needed)} of it at 512 images of 224 px"
    if (free or 0) >= needed or backend != "pil":
        return Line("ok", name, f"{text}; {uses}")
    fitting = int((free or 0) / (PIL_AHEAD * PIL_BATCH))
    cure = f"docker run --shm-size={math.ceil(needed / 1e9)}g, or set data.workers={fitting}"
    return Line("warning", name, f"{text}; {uses}", cure)


def check_open_files(machine: Machine) -> Line:
    text = f"up to {machine.open_files:,}"
    if machine.open_files < LEAST_OPEN_FILES:
        # -1 is no limit.
        if 0 <= machine.open_files_hard < LEAST_OPEN_FILES:
            cure = "raise the hard limit: docker run --ulimit nofile=4096, or /etc/security/limits.conf"
        else:
            cure = f"ulimit -n {min(4096, machine.open_files_hard) if machine.open_files_hard > 0 else 4096}"
        return Line("warning", "open files", f"{text} at once", cure)
    return Line("ok", "open files", text)


def check_caches(place: Path, home: Path | None, chosen: str | None) -> Line:
    """`place`: where caches lie; `home`: None where there is none; `chosen`: XDG_CACHE_HOME."""
    text = f"lists of images and decoded stores in {place}"
    if chosen or (home is not None and place.is_relative_to(home)):
        if can_hold(place):
            return Line("ok", "caches", text)
        cause = f"{place} cannot be written"
    elif home is None:
        cause = "there is no home folder (neither HOME nor the account names one)"
    else:
        cause = f"{home} (HOME) cannot be written"
    cure = "set XDG_CACHE_HOME, NUMBA_CACHE_DIR and TRITON_CACHE_DIR to folders that stay"
    return Line("warning", "caches", f"{cause}; {text}, compiled kernels below TMPDIR", cure)


def check_run_folder(folder: str, free: int, error: str | None) -> Line:
    """Facts of `look_at_run_folder`."""
    name = "run folder"
    if error:
        return Line("error", name, f"nothing can be written in {folder} ({error})", "set run.dir=FOLDER")
    text = f"{size(free)} free in {folder}"
    if free < LEAST_DISK:
        return Line("warning", name, f"{text}; the checkpoints of a ResNet-50 take 1 GB", "set run.dir=FOLDER")
    return Line("ok", name, text)


def check_reading(folder: str, probe: Probe, cores: float) -> Line:
    """`cores`: how many this process may use."""
    if probe.found is None:
        return Line("error", "data", f"{folder} cannot be read ({probe.reason})", "see the lines above")
    speed = ReadSpeed(**probe.found)
    if speed.kind == "nothing":
        cure = "give the folder that data.train names"
        return Line("error", "data", f"no images and no tar shards under {folder}", cure)
    if not speed.num_bytes or not speed.mean_image_bytes:
        cure = f"python -m fastsiam.prepare scan {folder}"
        return Line("error", "data", f"of the {speed.kind} under {folder} none could be read", cure)
    rate = speed.num_bytes / speed.seconds
    images = rate / speed.mean_image_bytes
    decoded = cores * DECODED_A_CORE * min(PHOTOGRAPH / speed.mean_image_bytes, _SMALL)
    network = ", a network file system" if is_network(speed.filesystem) else ""
    files = f", {speed.files / speed.seconds:,.0f} files/s" if speed.kind == "images" else " of tar shards"
    text = (
        f"{rate / 1e6:,.0f} MB/s{files} with {speed.threads} threads on {speed.filesystem}{network}: enough for "
        f"{images:,.0f} images/s of {size(speed.mean_image_bytes)}; the cores decode about {decoded:,.0f}"
    )
    if images < decoded:
        packed = "" if speed.kind == "shards" else "python -m fastsiam.prepare pack writes shards, which read faster; "
        return Line("warning", "data", text, f"{packed}a local disk helps most")
    return Line("ok", "data", text)
