"""Libraries and programs beyond `pip install -e '.[dev]'`: tests that need a missing one are skipped by name."""

import os
import shutil

import pytest

from fastsiam.doctor.facts import has_python_headers, is_installed

# By the name that `@pytest.mark.needs` takes: the module (None for a program), and what installs it.
LIBRARIES = {
    "dali": ("nvidia.dali", "pip install -e '.[dali]', or '.[dali-cu13]' beside a torch for CUDA 13"),
    "ffcv": ("ffcv", "pip install -e '.[ffcv]' (it is compiled: the README names the packages for that)"),
    "timm": ("timm", "pip install -e '.[timm]'"),
    "lightly": ("lightly", "pip install -e '.[peers]'"),
    "playwright": ("playwright", "pip install playwright"),
    "wandb": ("wandb", "pip install -e '.[wandb]'"),
    "mlflow": ("mlflow", "pip install -e '.[mlflow]'"),
    "sklearn": ("sklearn", "pip install scikit-learn"),
    "pycocotools": ("pycocotools", "pip install -e '.[detection]'"),
    "faster-coco-eval": ("faster_coco_eval", "pip install faster-coco-eval"),
    "onnx": ("onnxscript", "pip install -e '.[onnx]'"),
    "transformers": ("transformers", "pip install transformers"),
    "g++": (None, "apt-get install -y g++ python3-dev, or set CXX to another C++ compiler"),
}
CHROMIUM = "no Chromium: apt-get install -y chromium, or without root: playwright install chromium"


def installed(library: str) -> bool:
    module = LIBRARIES[library][0]
    if module is None:
        return shutil.which(os.environ.get("CXX", library)) is not None and has_python_headers()
    return is_installed(module)


def needed(item: pytest.Item) -> list[str]:
    """The libraries of a test's marks `needs`, and of the backend that it is parametrised with."""
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    found = [library for mark in item.iter_markers("needs") for library in mark.args]
    return [*found, *(library for library in LIBRARIES if str(backend).startswith(library))]


def reason(item: pytest.Item, library: str) -> str:
    """Reason for a skip: the test, the library that it needs, and the command that installs it."""
    return f"{item.name.partition('[')[0]} needs {library}: {LIBRARIES[library][1]}"


def missing(error: BaseException | None) -> str | None:
    """The library whose absence led to this error, by the names of what could not be imported."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            for library, (module, _) in LIBRARIES.items():
                # A namespace package may be absent with all that it would hold.
                if module and f"{module}.".startswith(f"{error.name}.") and not installed(library):
                    return library
        error = error.__cause__ or error.__context__
    return None


def browser_path(playwright) -> str:
    """The system's Chromium, or the one that playwright has downloaded; skips the test where there is neither."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, (*names, playwright.chromium.executable_path))), None)
    return path or pytest.skip(CHROMIUM)
