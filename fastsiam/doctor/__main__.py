"""fastsiam doctor [DATA_FOLDER] [--json]: checks what is installed, and the machine.

Each line has ok, warning or error, the facts and, where not ok, a code and a cure. Exit code 1 where there is an error,
else 0; 2 for a wrong argument. The libraries are imported in processes of their own, so that whatever their import does
becomes a line. With DATA_FOLDER its files are read for two seconds, past the page cache.
"""

import argparse
import json
import os
import resource
import shutil
import sys
from pathlib import Path

from fastsiam import cli
from fastsiam.doctor import facts, machine, software
from fastsiam.doctor.lines import Line
from fastsiam.errors import printable
from fastsiam.optim.apex import find_apex
from fastsiam.runtime.cache_dirs import cache_root, home_folder
from fastsiam.runtime.cores import cpu_quota, usable_cores

# Default of run.dir.
RUNS = Path("runs")
STYLES = {"ok": None, "warning": "yellow", "error": "red"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastsiam doctor",
        description="Check what is installed, and the machine; exit code 1 where there is an error.",
    )
    text = "measure how fast its files are read, for 2 s"
    parser.add_argument("data", metavar="DATA_FOLDER", nargs="?", type=os.path.expanduser, help=text)
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args(argv)
    if arguments.data is not None and not os.path.isdir(arguments.data):
        sentence = f"DATA_FOLDER: {printable(arguments.data)} is not a folder; give a folder of images"
        return cli.print_error(sentence, "not-a-folder")
    try:
        lines = examine(arguments.data)
    except KeyboardInterrupt:
        print("fastsiam: doctor was stopped", file=sys.stderr)
        return 130
    counts = {status: sum(line.status == status for line in lines) for status in STYLES}
    if arguments.json:
        summary = {"errors": counts["error"], "warnings": counts["warning"]}
        print(json.dumps({**summary, "lines": [line._asdict() for line in lines]}, indent=1))
    else:
        _print(lines, counts)
    return 1 if counts["error"] else 0


def examine(data: str | None = None) -> list[Line]:
    """Returns the lines of all checks; `data`: a folder whose reading is measured."""
    probes = facts.ask_libraries()
    lines = []
    for name, found in _judgements(probes).items():
        lines += [line._replace(name=line.name or name) for line in (found if isinstance(found, list) else [found])]
    if data is not None:
        # Measured last: the imports read files as well.
        lines.append(machine.check_reading(data, facts.ask("reading", data), usable_cores())._replace(name="data"))
    return lines


def _judgements(probes: dict[str, facts.Probe]) -> dict[str, Line | list[Line]]:
    """Judges all facts by the name of the check, in the order in which a cure helps the next one."""
    torch, nvml = probes["torch"].found or {}, probes["nvml"].found or {}
    gpu, cuda = bool(torch.get("gpus")), torch.get("cuda")
    wants_triton = next((text for text in facts.requirements("torch") if "triton" in text), "").partition(";")[0]
    # As Triton (triton/runtime/build.py) and `runtime.compile.eager_reason` choose them.
    c, cxx = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), os.environ.get("CXX", "g++")
    driver_cuda = nvml["cuda"][0] if gpu and nvml.get("cuda") else None
    installed = facts.distributions("nvidia-dali", "pynvml", "nvidia-ml-py")
    backend = (probes["backend"].found or {}).get("name")
    return {
        "python": software.check_python(sys.version_info[:3]),
        "packages": software.check_packages(facts.missing()),
        "torch": software.check_torch(probes["torch"]),
        "torchvision": software.check_torchvision(probes["torchvision"]),
        "driver": software.check_driver(probes["nvml"], cuda),
        "gpu": software.check_gpus(probes["torch"], probes["nvml"], os.environ.get("CUDA_VISIBLE_DEVICES")),
        "triton": software.check_triton(probes["triton"], wants_triton.strip(), gpu),
        "compilers": software.check_compilers(c, facts.has_python_headers(), shutil.which(cxx), gpu),
        "dali": software.check_dali(installed, probes.get("dali"), cuda, driver_cuda),
        "ffcv": software.check_ffcv(probes.get("ffcv"), () if "ffcv" in probes else facts.missing_for_ffcv()),
        "backend": software.check_backend(probes["backend"]),
        "apex": software.check_apex(find_apex()),
        "pynvml": software.check_nvml_bindings(installed),
        "pillow": software.check_pillow(probes["pillow"]),
        "cores": machine.check_cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_quota()),
        "memory": machine.check_memory(facts.system_memory(), facts.group_memory()),
        "shared memory": machine.check_shared_memory(facts.free_shared_memory(), usable_cores(), backend),
        "open files": machine.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        "caches": machine.check_caches(cache_root(), home_folder(), os.environ.get("XDG_CACHE_HOME")),
        "run folder": machine.check_run_folder(*facts.look_at_run_folder(RUNS)),
    }


def _print(lines: list[Line], counts: dict[str, int]) -> None:
    output = _printer()
    width = max(len(line.name) for line in lines)
    for line in lines:
        cure = f"; cure: {line.cure} [{line.code}]" if line.cure else ""
        output(printable(f"{line.status:7}  {line.name:{width}}  {line.text}{cure}"), STYLES[line.status])
    output(f"errors: {counts['error']}, warnings: {counts['warning']}", None)


def _printer():
    """Returns a function of a text and its style; without rich, which a line then names, there is no colour."""
    try:
        from rich.console import Console
    except ImportError:
        return lambda text, _: print(text)
    console = Console()
    return lambda text, style: console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
