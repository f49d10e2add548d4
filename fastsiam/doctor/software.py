"""The doctor's judgements on software: each a function of facts, without a look at the machine."""

import re
import shlex
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fastsiam.doctor.facts import Probe
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


class Line(NamedTuple):
    status: Literal["ok", "warning", "error"]
    name: str
    text: str
    cure: str = ""
    """A command or a setting; empty where all is well."""


def check_python(version: tuple[int, ...]) -> Line:
    text = ".".join(map(str, version[:3]))
    if version[:2] < OLDEST_PYTHON:
        return Line("error", "python", f"{text} is older than 3.11", "make the environment with python3.11 or later")
    return Line("ok", "python", text)


def check_packages(missing: list[str]) -> Line:
    """`missing`: what pip would install (`torch>=2.11`) of what fastsiam cannot do without."""
    if missing:
        names = ", ".join(re.match(r"[\w-]+", requirement)[0] for requirement in missing)
        quoted = " ".join(shlex.quote(requirement) for requirement in missing)
        return Line("error", "packages", f"not installed: {names}", f"pip install {quoted}")
    return Line("ok", "packages", "all that fastsiam needs is installed")


def check_torch(probe: Probe) -> Line:
    if probe.found is None:
        return Line(
            "error", "torch", f"cannot be imported ({probe.reason})", "pip install --force-reinstall torch torchvision"
        )
    version, cuda, hip = (probe.found[key] for key in ("version", "cuda", "hip"))
    text = f"{version}, built for " + (f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs only")
    if not OLDEST_TORCH <= release(version)[:2] <= NEWEST_TORCH:
        return Line(
            "warning", "torch", f"{text}; tried are 2.11 to 2.15", "pip install 'torch>=2.11,<2.16' torchvision"
        )
    return Line("ok", "torch", text)


def check_torchvision(probe: Probe) -> Line:
    if probe.found is None:
        cure = "pip install --force-reinstall torch torchvision, so that pip picks a pair"
        return Line("error", "torchvision", f"cannot be imported beside this torch ({probe.reason})", cure)
    return Line("ok", "torchvision", probe.found["version"])


def check_driver(nvml: Probe, torch_cuda: str | None) -> Line:
    """`torch_cuda`: the CUDA version that torch was built for."""
    if nvml.found is None:
        cure = "pip install --force-reinstall nvidia-ml-py"
        return Line("warning", "driver", f"NVML cannot be asked ({nvml.reason})", cure)
    error = nvml.found["error"]
    if error == "NVMLError_LibraryNotFound":
        return Line("ok", "driver", "no NVIDIA driver here (of a container: unless it is started with --gpus all)")
    if error:
        cure = "nvidia-smi; after an update of the driver, restart the machine"
        return Line("error", "driver", f"installed, but does not answer ({nvml.found['text']})", cure)
    driver, (major, minor) = nvml.found["driver"], nvml.found["cuda"]
    text = f"NVIDIA {driver}, for CUDA up to {major}.{minor}"
    if torch_cuda and major < release(torch_cuda)[0]:
        needed = release(torch_cuda)[0]
        cure = (
            f"install driver {DRIVERS[needed]} or later" if needed in DRIVERS else "install a newer driver"
        ) + f", or a torch built for CUDA {major} (pytorch.org, Get Started)"
        return Line("error", "driver", f"{text}, is too old for torch's CUDA {torch_cuda}", cure)
    return Line("ok", "driver", text)


def check_gpus(torch: Probe, nvml: Probe, visible: str | None) -> list[Line]:
    """A line a GPU. `visible`: CUDA_VISIBLE_DEVICES, None where it is not set."""
    seen = nvml.found["gpus"] if nvml.found else []
    if torch.found is None:
        return [Line("ok", "gpu", f"NVML sees {len(seen)}; what torch sees is not known")]
    if torch.found["gpus"]:
        return [_check_gpu(number, gpu, torch.found) for number, gpu in enumerate(torch.found["gpus"])]
    trains = f"trains on the CPU (train.precision=auto: {torch.found['cpu_precision']})"
    if not seen:
        return [Line("ok", "gpu", f"none; {trains}")]
    text = f"NVML sees {', '.join(seen)}, torch none; {trains}"
    if torch.found["cuda"] is None:
        cure = "install a torch built for CUDA (pytorch.org, Get Started)"
        return [Line("warning", "gpu", f"{text}, for it was built without CUDA", cure)]
    if visible is not None:
        text += f"; CUDA_VISIBLE_DEVICES={visible!r}"
    if visible in ("", "-1"):
        return [Line("warning", "gpu", text, "unset CUDA_VISIBLE_DEVICES")]
    return [Line("error", "gpu", f"{text} ({torch.found['cuda_error']})", "see the line on the driver, and nvidia-smi")]


def _check_gpu(number: int, gpu: dict, torch: dict) -> Line:
    name, capability = f"gpu {number}", tuple(gpu["capability"])
    text = f"{gpu['name']}, {size(gpu['memory'])}, compute capability {capability[0]}.{capability[1]}"
    if torch["hip"]:
        text = f"{gpu['name']}, {size(gpu['memory'])}, by ROCm, which nobody has tried"
        return Line("warning", name, text, "set train.device=cpu where it fails")
    if capability < OLDEST_CAPABILITY:
        return Line("error", name, f"{text}; Triton needs 7.0", "set train.device=cpu")
    if not has_kernels(torch["architectures"], capability):
        cure = "install another build of torch (pytorch.org, Get Started)"
        return Line("error", name, f"{text}; torch was built for {' '.join(torch['architectures'])}", cure)
    if gpu["error"]:
        return Line("error", name, f"{text}; computes nothing ({gpu['error']})", "nvidia-smi shows who uses it")
    text += f", {size(gpu['free'])} free; train.precision=auto: {gpu['precision']}"
    if gpu["free"] < gpu["memory"] / 2:
        cure = "nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES=N picks another"
        return Line("warning", name, f"{text}; others use more than half of it", cure)
    return Line("ok", name, text)


def check_triton(probe: Probe, requirement: str | None, gpu: bool) -> Line:
    """`requirement`: torch's own, `triton~=3.8.0`; builds for CPUs have none."""
    if probe.found is None:
        cure = f"pip install --force-reinstall '{requirement or 'triton'}'"
        return Line("error", "triton", f"cannot be imported ({probe.reason})", cure)
    version, ptxas = probe.found["version"], probe.found["ptxas"]
    wanted = re.search(r"[~=]=\s*(\d+(?:\.\d+)+)", requirement or "")
    if wanted and release(version)[:2] != release(wanted[1])[:2]:
        return Line("warning", "triton", f"{version}, where torch wants {wanted[1]}", f"pip install '{requirement}'")
    if gpu and ptxas is None:
        cure = "pip install --force-reinstall triton, or set TRITON_PTXAS_PATH"
        return Line("error", "triton", f"{version}, without ptxas, its assembler for NVIDIA GPUs", cure)
    return Line("ok", "triton", f"{version}, as torch wants" if wanted else version)


def check_c_compiler(compiler: str | None, headers: bool, gpu: bool) -> Line:
    """What Triton builds its launchers with, on GPUs."""
    if compiler and headers:
        return Line("ok", "C compiler", f"{compiler}, with Python's headers")
    text = "Python.h is missing" if compiler else "neither $CC nor gcc nor clang"
    cure = "apt-get install gcc python3-dev (Debian's names)"
    if gpu:
        return Line("error", "C compiler", f"{text}: Triton builds what starts its kernels", cure)
    return Line("ok", "C compiler", f"{text}; Triton needs it on GPUs only")


def check_cxx_compiler(torch: Probe) -> Line:
    """What Inductor compiles for CPUs with, which train.compile=auto leaves alone there."""
    name, use = "C++ compiler", "train.compile=on on a CPU"
    if torch.found is None:
        return Line("ok", name, "not known without torch")
    inductor = torch.found["inductor"]
    if "error" in inductor:
        return Line("warning", name, f"Inductor cannot be asked ({inductor['error']})", "set train.compile=off")
    if inductor["cxx"] is None:
        return Line("ok", name, f"none that Inductor finds; {use} needs one: apt-get install g++, or set CXX")
    return Line("ok", name, f"{inductor['cxx']}, for {use}")


def check_dali(installed: dict[str, str], probe: Probe | None, torch_cuda: str | None, driver_cuda: int | None) -> Line:
    """`installed`: versions by distribution; `driver_cuda`: the major version that the driver knows, None: no GPU."""
    wheels = {name: int(match[1]) for name in installed if (match := _DALI.fullmatch(name))}
    torch_major = release(torch_cuda)[0] if torch_cuda else None
    fits = "nvidia-dali-cuda130" if (driver_cuda or 0) >= 13 and torch_major == 13 else "nvidia-dali-cuda120"
    if not wheels:
        return Line("ok", "dali", f"not installed; pip install {fits} for speed")
    if len(wheels) > 1:
        cure = f"pip uninstall -y {' '.join(sorted(wheels))} && pip install {fits}"
        return Line("error", "dali", f"{' and '.join(sorted(wheels))} share one import path", cure)
    ((name, cuda),) = wheels.items()
    text = f"{name} {installed[name]}"
    if probe is None or probe.found is None:
        reason = probe.reason if probe else "no module nvidia.dali"
        cure = f"pip install --force-reinstall {name}, or set data.backend=pil"
        return Line("error", "dali", f"{text} cannot be imported ({reason})", cure)
    change = f"pip uninstall -y {name} && pip install {fits}"
    if driver_cuda and driver_cuda < cuda:
        return Line("error", "dali", f"{text} needs CUDA {cuda}, which the driver does not know", change)
    if release(installed[name])[:2] < OLDEST_DALI:
        return Line("warning", "dali", f"{text} is older than 1.51", f"pip install --upgrade {name}")
    if driver_cuda and torch_major and torch_major != cuda:
        return Line(
            "warning", "dali", f"{text} brings CUDA {cuda} and torch CUDA {torch_major} into one process", change
        )
    return Line("ok", "dali", text)


def check_ffcv(probe: Probe | None, missing: Sequence[str] = ()) -> Line:
    """None: not installed; `missing`: packages of the system that it is built from."""
    if probe is None:
        first = f"apt-get install {' '.join(missing)} (Debian's names), then " if missing else ""
        return Line("ok", "ffcv", f"not installed; it reads .beton files: {first}pip install ffcv setuptools")
    if probe.found is None:
        reason = probe.reason.removeprefix("MissingLibraryError: data.backend: ffcv ").partition("; it is built")[0]
        cure = (
            "apt-get install libopencv-dev libturbojpeg0-dev pkg-config (Debian's names), then pip install "
            "--force-reinstall --no-deps --no-cache-dir ffcv"
        )
        return Line("warning", "ffcv", reason, cure)
    return Line("ok", "ffcv", probe.found["version"])


def check_backend(probe: Probe) -> Line:
    if probe.found is None:
        cure = "see the lines above"
        return Line("error", "backend", f"fastsiam's own modules cannot be imported ({probe.reason})", cure)
    return Line("ok", "backend", f"data.backend=auto takes {probe.found['name']} ({probe.found['reason']})")


def check_apex(apex: Apex | None) -> Line:
    if apex is None:
        return Line("ok", "apex", "not installed; torch's fused SGD is the default")
    if not apex.is_nvidias:
        cure = f"pip uninstall apex; NVIDIA's is built {APEX_SOURCE}"
        return Line("warning", "apex", f"{apex.origin} belongs to another project of that name", cure)
    return Line("ok", "apex", f"NVIDIA's, {apex.origin}")


def check_nvml_bindings(installed: dict[str, str]) -> Line:
    """`installed`: versions of the distributions nvidia-ml-py and pynvml, which both own `import pynvml`."""
    if "pynvml" in installed:
        cure = "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
        return Line("warning", "pynvml", f"the deprecated distribution pynvml {installed['pynvml']} is installed", cure)
    version = installed.get("nvidia-ml-py")
    return Line("ok", "pynvml", f"nvidia-ml-py {version}" if version else "not installed; energy is not measured")


def check_pillow(probe: Probe) -> Line:
    """Pillow-SIMD calls itself PIL too, with a fourth number (9.5.0.post2)."""
    if probe.found is None:
        cure = "pip install --force-reinstall pillow"
        return Line("error", "pillow", f"cannot be imported ({probe.reason})", cure)
    version, turbo = probe.found["version"], probe.found["turbo"]
    jpeg = f"libjpeg-turbo {turbo}" if turbo else "a libjpeg that is not turbo: data.backend=pil decodes slowly"
    return Line("ok", "pillow", f"{version}{' (Pillow-SIMD)' if 'post' in version else ''}, {jpeg}")


def has_kernels(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether torch's build runs on a GPU: machine code of its major version and no later minor, or PTX of an earlier.

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


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: `2.14.1+cu130` is (2, 14, 1)."""
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def size(num_bytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
