"""Judgements of the doctor on installed software: each a function of facts."""

import re
import shlex
from collections.abc import Sequence

from fastsiam.doctor.facts import Probe
from fastsiam.doctor.lines import Line, error, ok, release, size, warning
from fastsiam.optim.apex import APEX_SOURCE, Apex

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)
OLDEST_PYTHON = (3, 11)
# First release with wheels for both CUDA majors.
OLDEST_DALI = (1, 51)
# CUDA Toolkit release notes, table "minimum required driver version for CUDA minor version compatibility".
DRIVERS = {11: 450, 12: 525, 13: 580}
# torch._inductor and Triton.
OLDEST_CAPABILITY = (7, 0)
_DALI = re.compile(r"nvidia-dali-(?:nightly-|weekly-)?cuda(\d\d)\d")


def check_python(version: tuple[int, ...]) -> Line:
    text = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        return error("old-python", f"{text} is older than 3.11", "make the environment with python3.11 or later")
    return ok(text)


def check_packages(missing: list[str]) -> Line:
    """`missing`: requirements that are not installed, `torch>=2.11`."""
    if not missing:
        return ok("all that fastsiam needs is installed")
    names = ", ".join(re.match(r"[\w-]+", requirement)[0] for requirement in missing)
    return error("missing-packages", f"not installed: {names}", f"pip install {shlex.join(missing)}")


def check_torch(probe: Probe) -> Line:
    if probe.found is None:
        return _fails("torch", probe, "pip install --force-reinstall torch torchvision")
    version, cuda, hip = (probe.found[key] for key in ("version", "cuda", "hip"))
    text = f"{version}, built for " + (f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs only")
    if not OLDEST_TORCH <= release(version)[:2] <= NEWEST_TORCH:
        return warning("untested-torch", f"{text}; tested: 2.11 to 2.15", "pip install 'torch>=2.11,<2.16' torchvision")
    return ok(text)


def check_torchvision(probe: Probe) -> Line:
    if probe.found is None:
        return _fails("torchvision", probe, "pip install --force-reinstall torch torchvision, a pair that pip picks")
    return ok(probe.found["version"])


def check_driver(nvml: Probe, torch_cuda: str | None) -> Line:
    """`torch_cuda`: the CUDA version that torch was built for."""
    if nvml.found is None:
        cure = "pip install --force-reinstall nvidia-ml-py"
        return warning("nvml-fails", f"NVML cannot be asked ({nvml.reason})", cure)
    if nvml.found["error"] == "NVMLError_LibraryNotFound":
        return ok("no NVIDIA driver here (in a container: unless it is started with --gpus all)")
    if nvml.found["error"]:
        cure = "nvidia-smi; after an update of the driver, restart the machine"
        return error("driver-fails", f"installed, but does not answer ({nvml.found['text']})", cure)
    driver, (major, minor) = nvml.found["driver"], nvml.found["cuda"]
    text = f"NVIDIA {driver}, for CUDA up to {major}.{minor}"
    needed = release(torch_cuda)[0] if torch_cuda else 0
    if major >= needed:
        return ok(text)
    newer = f"install driver {DRIVERS[needed]} or later" if needed in DRIVERS else "install a newer driver"
    cure = f"{newer}, or a torch built for CUDA {major} (pytorch.org, Get Started)"
    return error("old-driver", f"{text}, is too old for torch's CUDA {torch_cuda}", cure)


def check_gpus(torch: Probe, nvml: Probe, visible: str | None) -> list[Line]:
    """Returns a line for each GPU, or one where torch sees none; `visible`: CUDA_VISIBLE_DEVICES."""
    seen = nvml.found["gpus"] if nvml.found else []
    if torch.found is None:
        return [ok(f"NVML sees {len(seen)}; what torch sees is not known")]
    if torch.found["gpus"]:
        gpus = enumerate(torch.found["gpus"])
        return [_check_gpu(gpu, torch.found)._replace(name=f"gpu {number}") for number, gpu in gpus]
    trains = f"trains on the CPU (train.precision=auto: {torch.found['cpu_precision']})"
    if not seen:
        return [ok(f"none; {trains}")]
    text = f"NVML sees {', '.join(seen)}, torch none; {trains}"
    if torch.found["cuda"] is None:
        cure = "install a torch built for CUDA (pytorch.org, Get Started)"
        return [warning("torch-without-cuda", f"{text}: it was built without CUDA", cure)]
    if visible is not None:
        text += f"; CUDA_VISIBLE_DEVICES={visible!r}"
    if visible in ("", "-1"):
        return [warning("hidden-gpus", text, "unset CUDA_VISIBLE_DEVICES")]
    cure = "see the line on the driver, and nvidia-smi"
    return [error("gpus-out-of-reach", f"{text} ({torch.found['cuda_error']})", cure)]


def _check_gpu(gpu: dict, torch: dict) -> Line:
    if torch["hip"]:
        text = f"{gpu['name']}, {size(gpu['memory'])}; ROCm is not tested with fastsiam"
        return warning("rocm", text, "set train.device=cpu where it fails")
    capability = tuple(gpu["capability"])
    text = f"{gpu['name']}, {size(gpu['memory'])}, compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST_CAPABILITY:
        return error("old-gpu", f"{text}; Triton needs 7.0", "set train.device=cpu")
    if not has_kernels(torch["architectures"], capability):
        cure = "install another build of torch (pytorch.org, Get Started)"
        return error("no-kernels", f"{text}; torch was built for {' '.join(torch['architectures'])}", cure)
    if gpu["error"]:
        return error("gpu-fails", f"{text}; it fails to compute ({gpu['error']})", "nvidia-smi shows its processes")
    text += f", {size(gpu['free'])} free; train.precision=auto: {gpu['precision']}"
    if gpu["free"] < gpu["memory"] / 2:
        cure = "nvidia-smi shows its processes; CUDA_VISIBLE_DEVICES=N picks another GPU"
        return warning("gpu-in-use", f"{text}; others use more than half of it", cure)
    return ok(text)


def check_triton(probe: Probe, requirement: str | None, gpu: bool) -> Line:
    """`requirement`: torch's own, `triton~=3.8.0`; builds for CPUs have none."""
    if probe.found is None:
        return _fails("triton", probe, f"pip install --force-reinstall '{requirement or 'triton'}'")
    version, wanted = probe.found["version"], re.search(r"[~=]=\s*(\d+(?:\.\d+)+)", requirement or "")
    if wanted and release(version)[:2] != release(wanted[1])[:2]:
        return warning("other-triton", f"{version}, where torch wants {wanted[1]}", f"pip install '{requirement}'")
    if gpu and probe.found["ptxas"] is None:
        cure = "pip install --force-reinstall triton, or set TRITON_PTXAS_PATH"
        return error("no-ptxas", f"{version}, without ptxas, its assembler for NVIDIA GPUs", cure)
    return ok(f"{version}, as torch wants" if wanted else version)


def check_compilers(c: str | None, headers: bool, cxx: str | None, gpu: bool) -> Line:
    """Judges what builds Triton's launchers (C, Python.h) and torch.compile's graphs (C++); `gpu`: torch sees one."""
    lacking = {
        "gcc": c is None and "a C compiler (for Triton)",
        "python3-dev": not headers and "Python.h (for Triton)",
        "g++": cxx is None and "a C++ compiler (for torch.compile)",
    }
    packages = [package for package, text in lacking.items() if text]
    if not packages:
        return ok(f"{c} and {cxx}, with Python's headers")
    text, cure = f"missing: {', '.join(filter(None, lacking.values()))}", f"apt-get install {' '.join(packages)}"
    if not gpu:
        return ok(f"{text}; needed on GPUs, and for train.compile=on: {cure}")
    # Without a C++ compiler train.compile=auto stays eager; without Triton's nothing trains.
    return (warning if packages == ["g++"] else error)("no-compiler", text, f"{cure} (Debian's names)")


def check_dali(installed: dict[str, str], probe: Probe | None, torch_cuda: str | None, driver_cuda: int | None) -> Line:
    """`installed`: versions by distribution; `driver_cuda`: the major version that the driver knows, None: no GPU."""
    wheels = {name: int(match[1]) for name in installed if (match := _DALI.fullmatch(name))}
    torch_major = release(torch_cuda)[0] if torch_cuda else None
    fits = "nvidia-dali-cuda130" if (driver_cuda or 0) >= 13 and torch_major == 13 else "nvidia-dali-cuda120"
    if not wheels:
        return ok(f"not installed; pip install {fits} for speed")
    names = sorted(wheels)
    change = f"pip uninstall -y {' '.join(names)} && pip install {fits}"
    if len(names) > 1:
        return error("two-dalis", f"{' and '.join(names)} share one import path", change)
    ((name, cuda),) = wheels.items()
    text = f"{name} {installed[name]}"
    if probe is None or probe.found is None:
        cure = f"pip install --force-reinstall {name}, or set data.backend=pil"
        return error("dali-fails", f"{text} cannot be imported ({probe.reason if probe else 'no such module'})", cure)
    if driver_cuda and driver_cuda < cuda:
        return error("dali-of-newer-cuda", f"{text} needs CUDA {cuda}, which the driver does not know", change)
    if release(installed[name])[:2] < OLDEST_DALI:
        return warning("old-dali", f"{text} is older than 1.51", f"pip install --upgrade {name}")
    if driver_cuda and torch_major and torch_major != cuda:
        return warning("dali-of-other-cuda", f"{text} brings CUDA {cuda} beside CUDA {torch_major} of torch", change)
    return ok(text)


def check_ffcv(probe: Probe | None, missing: Sequence[str] = ()) -> Line:
    """`probe`: None where it is not installed; `missing`: packages of the system that it is built from."""
    if probe is None:
        first = f"apt-get install {' '.join(missing)} (Debian's names), then " if missing else ""
        return ok(f"not installed; it reads .beton files: {first}pip install ffcv setuptools")
    if probe.found is None:
        cure = "pip install --force-reinstall --no-deps --no-cache-dir ffcv"
        return warning("ffcv-fails", probe.reason.partition("data.backend: ")[2] or probe.reason, cure)
    return ok(probe.found["version"])


def check_backend(probe: Probe) -> Line:
    if probe.found is None:
        return error("fastsiam-fails", f"fastsiam cannot be imported ({probe.reason})", "see the lines above")
    return ok(f"data.backend=auto takes {probe.found['name']} ({probe.found['reason']})")


def check_apex(apex: Apex | None) -> Line:
    if apex is None:
        return ok("not installed; torch's fused SGD is the default")
    if not apex.is_nvidias:
        cure = f"pip uninstall apex; NVIDIA's is built {APEX_SOURCE}"
        return warning("other-apex", f"{apex.origin} belongs to another project of that name", cure)
    return ok(f"NVIDIA's, {apex.origin}")


def check_nvml_bindings(installed: dict[str, str]) -> Line:
    """`installed`: versions of the distributions nvidia-ml-py and pynvml, which both own `import pynvml`."""
    if "pynvml" in installed:
        cure = "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
        return warning("deprecated-pynvml", f"the distribution pynvml {installed['pynvml']} is deprecated", cure)
    version = installed.get("nvidia-ml-py")
    return ok(f"nvidia-ml-py {version}" if version else "not installed; energy is not measured")


def check_pillow(probe: Probe) -> Line:
    """Pillow-SIMD has the same import name, and a fourth number (9.5.0.post2)."""
    if probe.found is None:
        return _fails("pillow", probe, "pip install --force-reinstall pillow")
    version, turbo = probe.found["version"], probe.found["turbo"]
    jpeg = f"libjpeg-turbo {turbo}" if turbo else "a libjpeg that is not turbo: data.backend=pil decodes slowly"
    return ok(f"{version}{' (Pillow-SIMD)' if 'post' in version else ''}, {jpeg}")


def _fails(name, probe, cure):
    return error(f"{name}-fails", f"cannot be imported ({probe.reason})", cure)


def has_kernels(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Returns True where torch's build has machine code of this major version and no later minor, or earlier PTX.

    `architectures`: of torch.cuda.get_arch_list(), such as `sm_90`, `sm_90a` (for that one alone), `sm_100f` and
    `compute_120` (PTX).
    """
    for architecture in architectures:
        kind, number, only = re.fullmatch(r"(sm|compute)_(\d+)(a?)f?", architecture).groups()
        built = divmod(int(number), 10)
        if built == capability:
            return True
        if not only and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False
