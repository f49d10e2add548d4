"""Judgements of the doctor on the machine, its cores, memory, limits and disks: each a function of facts."""

import math
from pathlib import Path

from fastsiam.data.read_speed import ReadSpeed, is_network
from fastsiam.doctor.facts import Probe
from fastsiam.doctor.lines import Line, error, ok, size, warning
from fastsiam.runtime.cache_dirs import can_hold
from fastsiam.runtime.cores import whole_cores

# Importing torch, torchvision and the kernels takes 0.8 GB.
LEAST_MEMORY = 2e9
LEAST_OPEN_FILES = 1024
# ResNet-50: 38 million parameters and their momentum, three checkpoints (checkpoint.keep and the one being written).
LEAST_DISK = 2e9
# A batch of r50_100ep.yaml, uint8; a DataLoader's worker holds two (its prefetch_factor).
PIL_BATCH = 512 * 2 * 3 * 224 * 224
PIL_AHEAD = 2
# Row `dali matrix` with two workers on two cores, in benchmarks/results/2026-11-24_epyc-2-cores/loader.jsonl: two views
# of 224 px an image. Photographs of ImageNet have 110 kB on average.
IMAGES_A_CORE, PHOTOGRAPH = 719 / 2, 110e3
# An image of less than a tenth of a photograph costs more than its bytes.
MOST_OF_A_PHOTOGRAPH = 10


def check_cores(seen: int, allowed: int, quota: float) -> Line:
    """`seen`: of the machine; `allowed`: by the affinity of the process; `quota`: of its control groups, inf: none."""
    by = "a quota of the container" if quota < allowed else "the affinity of the process"
    limited = f", limited by {by}" if min(allowed, quota) < seen else ""
    workers = whole_cores(allowed, quota)
    return ok(f"{min(allowed, quota):.3g} of {seen}{limited}; data.workers={workers} by default")


def check_memory(system: float, group: float) -> Line:
    """Bytes that the system and the control groups leave; inf where it is not known."""
    available = min(system, group)
    if math.isinf(available):
        return ok("not known")
    text = f"{size(available)} available{', limited by the container' if group < system else ''}"
    if available < LEAST_MEMORY:
        return warning("little-memory", f"{text}; torch alone takes 0.8 GB", "end other processes, or raise the limit")
    return ok(text)


def check_shared_memory(free: int | None, cores: int, backend: str | None) -> Line:
    """Judges the bytes free in /dev/shm, through which data.backend=pil's workers send batches and nothing else does.

    `free`: None where there is no /dev/shm; `cores`: workers by default.
    """
    needed = cores * PIL_AHEAD * PIL_BATCH
    text = "no /dev/shm" if free is None else f"{size(free)} free in /dev/shm"
    if (free or 0) >= needed or backend != "pil":
        return ok(text)
    text += f"; data.backend=pil with {cores} workers takes {size(needed)} at 512 images of 224 px"
    workers = int((free or 0) / (PIL_AHEAD * PIL_BATCH))
    cure = f"docker run --shm-size={math.ceil(needed / 1e9)}g, or set data.workers={workers}"
    return warning("little-shared-memory", text, cure)


def check_open_files(soft: int, hard: int) -> Line:
    text = f"up to {soft:,} at once"
    if soft >= LEAST_OPEN_FILES:
        return ok(text)
    # -1 is no limit.
    if 0 <= hard < LEAST_OPEN_FILES:
        cure = "raise the hard limit: docker run --ulimit nofile=4096, or /etc/security/limits.conf"
    else:
        cure = f"ulimit -n {min(4096, hard) if hard > 0 else 4096}"
    return warning("few-open-files", text, cure)


def check_caches(place: Path, home: Path | None, chosen: str | None) -> Line:
    """`place`: where caches lie; `home`: None where there is none; `chosen`: XDG_CACHE_HOME."""
    text = f"lists of images and decoded stores in {place}"
    if chosen or (home is not None and place.is_relative_to(home)):
        if can_hold(place):
            return ok(text)
        code, cause = "cache-not-writable", f"{place} cannot be written"
    elif home is None:
        code, cause = "no-home", "there is no home folder (neither HOME nor the account names one)"
    else:
        code, cause = "home-not-writable", f"{home} (HOME) cannot be written"
    cure = "set XDG_CACHE_HOME, NUMBA_CACHE_DIR and TRITON_CACHE_DIR to folders that stay"
    return warning(code, f"{cause}; {text}, compiled kernels below TMPDIR", cure)


def check_run_folder(folder: str, free: int, reason: str | None) -> Line:
    """Facts of `look_at_run_folder`."""
    if reason:
        return error("run-folder-not-writable", f"cannot write in {folder} ({reason})", "set run.dir=FOLDER")
    text = f"{size(free)} free in {folder}"
    if free < LEAST_DISK:
        return warning("little-disk", f"{text}; the checkpoints of a ResNet-50 take 1 GB", "set run.dir=FOLDER")
    return ok(text)


def check_reading(folder: str, probe: Probe, cores: float) -> Line:
    """Judges the `ReadSpeed` of a data folder by the images/s that `cores` decode."""
    if probe.found is None:
        return error("data-not-measured", f"{folder} cannot be read ({probe.reason})", "see the lines above")
    speed = ReadSpeed(**probe.found)
    if speed.kind == "nothing":
        return error(
            "no-images", f"no images and no tar shards under {folder}", "give the folder that data.train names"
        )
    if not speed.num_bytes or not speed.mean_image_bytes:
        return error("unreadable-images", f"no file of {folder} could be read", f"fastsiam prepare scan {folder}")
    rate = speed.num_bytes / speed.seconds
    images = rate / speed.mean_image_bytes
    decoded = cores * IMAGES_A_CORE * min(PHOTOGRAPH / speed.mean_image_bytes, MOST_OF_A_PHOTOGRAPH)
    network = ", a network file system" if is_network(speed.filesystem) else ""
    files = f", {speed.files / speed.seconds:,.0f} files/s" if speed.kind == "images" else " of tar shards"
    text = (
        f"{rate / 1e6:,.0f} MB/s{files} with {speed.threads} threads on {speed.filesystem}{network}: enough for "
        f"{images:,.0f} images/s of {size(speed.mean_image_bytes)}; the cores decode about {decoded:,.0f}"
    )
    if images >= decoded:
        return ok(text)
    packed = "" if speed.kind == "shards" else "fastsiam prepare pack writes shards, which read faster; "
    return warning("slow-disk", text, f"{packed}a local disk helps most")
