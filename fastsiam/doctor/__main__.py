"""python -m fastsiam.doctor [DATA_FOLDER] [--json]: what is installed, what mismatches, what would run where.

Each line says ok, warning or error, what was found and, where not ok, what to do. Exit code 1 where there is an error,
else 0; 2 for a wrong argument. The libraries are imported in processes of their own, so that whatever their import does
becomes a line. With DATA_FOLDER its files are read for two seconds, past the page cache.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from fastsiam.doctor import facts
from fastsiam.doctor import machine as machines
from fastsiam.doctor import software as checks
from fastsiam.doctor.software import Line
from fastsiam.optim.apex import find_apex
from fastsiam.runtime.cache_dirs import cache_root, home_folder

STYLES = {"ok": None, "warning": "yellow", "error": "red"}
# Where a run makes its folder: run.dir's default.
RUNS = Path("runs")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastsiam.doctor",
        description="What is installed, what mismatches, what would run where; exit code 1 where there is an error.",
    )
    what = "measure how fast its files are read, for 2 s"
    parser.add_argument("data", metavar="DATA_FOLDER", nargs="?", type=os.path.expanduser, help=what)
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args(argv)
    if arguments.data is not None and not os.path.isdir(arguments.data):
        print(f"fastsiam: DATA_FOLDER: {_shown(arguments.data)} is no folder; give one of images", file=sys.stderr)
        return 2
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
    """All checks, in the order in which a cure helps the next one; `data`: a folder whose reading is measured."""
    dali, ffcv = facts.is_installed("nvidia.dali"), facts.is_installed("ffcv")
    wanted = {name: (name,) for name in ("torch", "nvml", "triton", "backend", "pillow")}
    wanted |= {"dali": ("module", "nvidia.dali")} if dali else {}
    wanted |= {"ffcv": ("ffcv",)} if ffcv else {}
    probes = facts.ask_all(wanted)
    # Importing it takes seconds; where fastsiam's own modules could, it is known.
    whole = probes["backend"].found
    vision = facts.Probe({"version": whole["torchvision"]}) if whole else facts.ask("module", "torchvision")
    probes["torchvision"] = vision
    machine = facts.look_at_machine()
    lines = [*_software(probes), *_machine(machine, probes)]
    if data is not None:
        # Alone: the imports read files, too.
        reading = facts.ask("reading", data)
        lines.append(machines.check_reading(data, reading, min(machine.cores_allowed, machine.cores_quota)))
    return lines


def _software(probes: dict[str, facts.Probe]) -> list[Line]:
    torch, nvml = probes["torch"].found or {}, probes["nvml"].found or {}
    gpu = bool(torch.get("gpus"))
    wants_triton = (text.partition(";")[0].strip() for text in facts.requirements("torch") if "triton" in text)
    driver_cuda = nvml["cuda"][0] if gpu and nvml.get("cuda") else None
    return [
        checks.check_python(sys.version_info[:3]),
        checks.check_packages(facts.missing()),
        checks.check_torch(probes["torch"]),
        checks.check_torchvision(probes["torchvision"]),
        checks.check_driver(probes["nvml"], torch.get("cuda")),
        *checks.check_gpus(probes["torch"], probes["nvml"], os.environ.get("CUDA_VISIBLE_DEVICES")),
        checks.check_triton(probes["triton"], next(wants_triton, None), gpu),
        checks.check_c_compiler(facts.c_compiler(), facts.has_python_headers(), gpu),
        checks.check_cxx_compiler(probes["torch"]),
        checks.check_dali(facts.distributions("nvidia-dali"), probes.get("dali"), torch.get("cuda"), driver_cuda),
        checks.check_ffcv(probes.get("ffcv"), () if "ffcv" in probes else facts.missing_for_ffcv()),
        checks.check_backend(probes["backend"]),
        checks.check_apex(find_apex()),
        checks.check_nvml_bindings(facts.distributions("pynvml", "nvidia-ml-py")),
        checks.check_pillow(probes["pillow"]),
    ]


def _machine(machine: facts.Machine, probes: dict[str, facts.Probe]) -> list[Line]:
    backend = probes["backend"].found
    return [
        machines.check_cores(machine),
        machines.check_memory(machine),
        machines.check_shared_memory(machine, backend["name"] if backend else None),
        machines.check_open_files(machine),
        machines.check_caches(cache_root(), home_folder(), os.environ.get("XDG_CACHE_HOME")),
        machines.check_run_folder(**facts.look_at_run_folder(RUNS)),
    ]


def _print(lines: list[Line], counts: dict[str, int]) -> None:
    say = _speaker()
    width = max(len(line.name) for line in lines)
    for status, name, text, cure in lines:
        say(_shown(f"{status:7}  {name:{width}}  {text}" + (f"; cure: {cure}" if cure else "")), STYLES[status])
    say(f"errors: {counts['error']}, warnings: {counts['warning']}", None)


def _speaker():
    """A function of a text and its style; without rich, which a line then calls missing, there is no colour."""
    try:
        from rich.console import Console
    except ImportError:
        return lambda text, _: print(text)
    console = Console()
    return lambda text, style: console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def _shown(text: str) -> str:
    """Of a file's name the bytes that are no UTF-8 as \\xNN, which a terminal's encoding would refuse."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
