"""Layout of the code: imports point one way, files are small, errors have codes, some rooms do not import torch."""

import ast
import functools
import importlib
from pathlib import Path

import pytest

from fastsiam.__main__ import COMMANDS, main
from tests.support.processes import REPOSITORY, run_python

# Each row may import from the rows above it and from its own row.
LAYERS = (
    {"errors", "runtime.cache_dirs", "kernels"},
    {"config"},
    {"runtime"},
    {"data", "models", "optim", "cli"},
    {"methods", "training"},
    {"evaluate"},
    {"run"},
    {"prepare", "doctor", "report", "plan", "replay", "follow", "config.__main__"}
    | {"evaluate.protocols", "evaluate.detection", "embed", "export"},
    {"evaluate.__main__", "sweep"},
    {"experiments"},
    {"train", "__main__"},
)
TORCH_FREE = (
    "config.__main__", "embed.__main__", "evaluate.__main__",
    "cli", "config", "config.budget", "config.published", "config.views", "data.demo_images", "data.read_speed",
    "data.rng", "data.sources.open", "data.sources.pixel_range", "data.sources.deep_pixels", "data.backends.store_size",
    "doctor.__main__", "doctor.probe", "errors", "optim.apex", "plan.__main__", "prepare.__main__", "prepare.cifar10",
    "prepare.pack", "follow.__main__", "replay.__main__", "report.__main__", "report.page", "report.watch",
    "run.folder", "run.progress_line", "run.reading", "export.__main__",
    "sweep.__main__", "sweep.engine", "sweep.page", "experiments.__main__",
    "run.stop_signals", "run.tensorboard", "run.write_report", "runtime.energy", "runtime.files", "train",
    "training.cost",
)  # fmt: skip


def modules():
    for folder in ("fastsiam", "kernels"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            yield name if folder == "fastsiam" else f"fastsiam.{name}", path


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path, inside_functions=True):
    for node in ast.walk(parsed(path)) if inside_functions else parsed(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name):
    """Returns the row of the most specific room that holds `name`; None for what is not a room of ours."""
    if not name or not name.startswith("fastsiam."):
        return None
    name = name.removeprefix("fastsiam.")
    while name:
        for number, rooms in enumerate(LAYERS):
            if name in rooms:
                return number
        name = name.rpartition(".")[0]
    return None


def test_every_module_has_its_room():
    assert [name for name, _ in modules() if name != "fastsiam" and layer(name) is None] == []


def test_imports_point_downwards():
    wrong = []
    for name, path in modules():
        for target in imported(path, inside_functions=name != "fastsiam.train"):
            room = layer(target) if name != "fastsiam" else None
            if room is not None and room > layer(name):
                wrong.append((name, target))
    assert wrong == []


def test_modules_import_each_other_in_no_circle():
    """Imports inside functions count; `from package import module` is an import of the module."""
    paths, graph = dict(modules()), {}
    for name, path in paths.items():
        found = {target for target in imported(path) if target in paths}
        packages = {target.rpartition(".")[0] for target in found}
        graph[name] = found - packages - {name}
    del graph["fastsiam"]
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_kernels_import_only_torch_triton_and_numba():
    allowed = ("torch", "triton", "numba", "llvmlite", "numpy", "contextlib", "math", "functools", "os", "pathlib")
    # Where compiled code is kept; imports the standard library alone.
    allowed += ("fastsiam.kernels", "fastsiam.runtime.cache_dirs")
    for name, path in modules():
        if name.startswith("fastsiam.kernels"):
            assert [target for target in imported(path) if not target.startswith(allowed)] == []


def test_nobody_imports_kernels_bare():
    """The name belongs to another package, and a second import name would register every op twice."""
    files = [path for folder in ("fastsiam", "kernels", "tests") for path in (REPOSITORY / folder).rglob("*.py")]
    bare = [path for path in files for target in imported(path) if target and target.split(".")[0] == "kernels"]
    assert len(files) > 30
    assert bare == []


def test_some_rooms_do_not_import_torch():
    """Imports them in one process, which names the first room that imports torch."""
    names = [f"fastsiam.{name}" for name in TORCH_FREE]
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    done = run_python("-c", script + "    'torch' in sys.modules and sys.exit(name)", *names)
    assert done.returncode == 0, done.stderr


@functools.cache
def sources():
    """Text and classes, functions and calls of each Python file of ours, by its path below the repository."""
    kinds, found = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Call), {}
    for folder in ("fastsiam", "kernels", "benchmarks", "tests"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, kinds)]
            found[str(path.relative_to(REPOSITORY))] = path.read_text(), nodes
    return found


def test_files_classes_and_functions_fit_on_a_few_screens():
    """350, 200 and 60 lines."""
    assert [path for path, (text, _) in sources().items() if len(text.splitlines()) > 350] == []
    limits = {ast.ClassDef: 200, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
    every = [(path, node) for path, (_, nodes) in sources().items() for node in nodes if type(node) in limits]
    large = [(path, node.name) for path, node in every if node.end_lineno - node.lineno >= limits[type(node)]]
    assert large == []


def test_errors_for_users_have_codes():
    found = []
    for path, (_, nodes) in sources().items():
        for node in nodes:
            name = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
            if name in ("UserError", "MissingLibraryError") and len(node.args) + len(node.keywords) < 2:
                found.append(f"{path}:{node.lineno}")
    assert [place for place in found if not place.startswith("tests/")] == []


def test_the_top_holds_what_is_run_or_imported():
    found = {path.name for path in (REPOSITORY / "fastsiam").iterdir() if path.name != "__pycache__"}
    files = {"__init__.py", "__main__.py", "cli.py", "errors.py", "train.py", "py.typed"}
    # Links, so that both are parts of the package.
    assert all((REPOSITORY / "fastsiam" / name).is_symlink() for name in ("kernels", "configs"))
    assert {name for name in found if (REPOSITORY / "fastsiam" / name).is_file()} == files


@pytest.mark.parametrize(("argument", "said"), [("--help", "commands:"), ("--version", "fastsiam 0.1.0\n")])
def test_the_command_prints_what_it_is(argument, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main([argument])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert said in printed
    assert argument == "--version" or all(f"\n  {command} " in printed for command in COMMANDS)


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_public_names_load():
    import fastsiam

    assert {"load_config", "pretrain", "build_loader", "build_method", "load_encoder", "knn_accuracy"} < set(
        fastsiam.__all__
    )
    for name in fastsiam.__all__:
        assert getattr(fastsiam, name)
    assert dir(fastsiam) == sorted(fastsiam.__all__)
    assert fastsiam.kernels is importlib.import_module("fastsiam.kernels")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fastsiam.trian
