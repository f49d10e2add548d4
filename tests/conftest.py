"""Small data made on the spot, and configs small enough for one core."""

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Each process of the tests has one thread, and so has what it starts.
os.environ["OMP_NUM_THREADS"] = "1"
# Triton reads this where a kernel is defined: without a GPU its interpreter runs them, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastsiam.config import load_config
from fastsiam.data.demo_images import draw_demo
from fastsiam.runtime.cores import usable_cores
from tests.support import optional
from tests.support.gloo_ranks import Ranks
from tests.support.gpu_record import GpuRecord
from tests.support.runs import TINY


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bit-equal runs need one thread count, and two cores serve other processes too."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """A run's report takes 2 to 4 seconds of a process of its own; tests/report/test_page.py has it written."""
    monkeypatch.setattr("fastsiam.run.finish.write_own_report", lambda folder: ("report    none in tests", None))


@pytest.fixture(scope="session")
def ranks(cache):
    """Functions run by several gloo processes, see `Ranks`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """10 classes x (8 train + 4 val) demo images of 48 px."""
    root = tmp_path_factory.mktemp("images") / "demo"
    draw_demo(root, seed=3, train_per_class=8, val_per_class=4)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """16 smooth colour JPEGs of different sizes in 4 classes, one of them turned by EXIF, one grey, one PNG."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(16):
        folder = root / f"class{number % 4}"
        folder.mkdir(exist_ok=True)
        size = tuple(int(side) for side in generator.integers(40, 200, 2))
        coarse = generator.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        if number == 5:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(folder / "turned.jpg", quality=95, exif=exif)
        elif number == 6:
            image.convert("L").save(folder / "grey.jpg", quality=95)
        elif number == 7:
            image.save(folder / "picture.png")
        else:
            image.save(folder / f"{number:02d}.jpg", quality=95)
    return root


@pytest.fixture
def put(tmp_path):
    """A function that writes `{name: text}` below tmp_path, which stands for the root of the file system."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.fixture(scope="session")
def picture():
    """The bytes of a JPEG of 8 x 6 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def resident_cache(tmp_path, monkeypatch):
    """Folder in which the backend resident keeps decoded images during a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fastsiam/resident"


@pytest.fixture
def tiny(demo_folder, tmp_path):
    """A function giving the overrides of a tiny quickstart on the demo images, with its run folder in tmp_path."""

    def overrides(*more):
        paths = (
            f"data.train={demo_folder}/train",
            f"data.val={demo_folder}/val",
            f"run.dir={tmp_path}/runs",
            "run.name=run",
        )
        return [*TINY, *paths, *more]

    return overrides


@pytest.fixture
def tiny_config(tiny):
    return lambda *more: load_config("quickstart.yaml", tiny(*more))


@pytest.fixture
def budgeted(tiny):
    """As `tiny`, for a budget in place of epochs."""
    return lambda *more: tiny("train.epochs=null", "evaluate.knn_every_epochs=null", *more)


def pytest_xdist_auto_num_workers(config):
    """A process a core, up to four; none for a single file or for the tests of a GPU, which count what they measure."""
    paths = [argument.partition("::")[0] for argument in config.args]
    alone = len(paths) == 1 and Path(paths[0]).is_file()
    return 0 if alone or config.option.markexpr == "gpu" else min(usable_cores(), 4)


def pytest_configure(config):
    if torch.cuda.is_available() and not hasattr(config, "workerinput"):
        config.pluginmanager.register(GpuRecord())


def pytest_collection_modifyitems(config, items):
    """Skip tests marked gpu where there is no CUDA device, and `needs` where a library is missing; CI has them all."""
    if hasattr(config, "workerinput"):
        # In several processes, files with many slow tests first: one of them at the end would leave a core idle.
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
    gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))
        for library in optional.needed(item):
            if not optional.installed(library):
                item.add_marker(pytest.mark.skip(reason=optional.reason(item, library)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip a test that cannot import what is not installed; `needs` is for those in which that looks otherwise."""
    report = yield
    library = optional.missing(call.excinfo.value) if report.failed and call.excinfo else None
    if library:
        path, line, _ = item.location
        report.outcome, report.longrepr = "skipped", (path, line + 1, f"Skipped: {optional.reason(item, library)}")
    return report
