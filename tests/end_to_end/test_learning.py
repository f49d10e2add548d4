"""A shortened quickstart learns, a collapse is told, and the guard is silent on healthy runs of many kinds."""

import json
import shutil
import tarfile

import pytest

from fastsiam.data.demo_images import draw_demo
from fastsiam.train import main
from tests.support.processes import REPOSITORY
from tests.support.runs import lines

pytestmark = pytest.mark.slow

SHARED = REPOSITORY.parent / "shared/data"
EPOCHS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The quickstart's images, of the seed that with its run's was the hardest found while the recipe was tuned."""
    root = tmp_path_factory.mktemp("quickstart") / "demo"
    draw_demo(root, seed=2024)
    return root


@pytest.fixture(scope="module")
def train(images, tmp_path_factory):
    """Runs the shortened quickstart under a name; gives exit code and run folder."""
    runs = tmp_path_factory.mktemp("runs")

    def run(name, *overrides):
        arguments = [
            f"data.train={images}/train", f"data.val={images}/val", "data.demo_seed=2024", "data.workers=1",
            "train.seed=2025", "train.device=cpu", "train.precision=fp32", f"train.epochs={EPOCHS}",
            "evaluate.knn_every_epochs=null", f"run.dir={runs}", f"run.name={name}",
        ]  # fmt: skip
        return main(["--config", "quickstart", *arguments, *overrides]), runs / name

    return run


@pytest.fixture(scope="module")
def healthy(train):
    return train("healthy")


def last(folder, kind):
    return [line for line in lines(folder) if line["kind"] == kind][-1]


def test_the_quickstart_learns_what_no_shortcut_gives(healthy):
    """Half of its 8 epochs suffice for that."""
    code, folder = healthy
    assert code == 0
    controls = next(line for line in lines(folder) if line["kind"] == "knn")
    top1 = last(folder, "end")["knn_top1"]
    assert controls["knn_top1"] < 45
    assert controls["raw_pixels_knn_top1"] < 35
    assert top1 > controls["knn_top1"] + 15
    assert top1 > controls["raw_pixels_knn_top1"] + 25
    assert last(folder, "train")["loss"] < -0.4


def test_without_the_stop_gradient_the_run_is_told_as_collapsing_and_stops(train, healthy, capsys):
    code, folder = train("collapsing", "method.stop_gradient=false", "evaluate.controls=false")
    assert code == 3
    assert "COLLAPSED at step" in capsys.readouterr().out
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "collapsed"
    assert status["std_ratio"] < 0.1
    # Judged from step 124 on, every 62 steps, by two measures in a row.
    assert status["step"] <= 3 * 62
    assert train("collapsing", "method.stop_gradient=false", "evaluate.controls=false")[0] == 3
    assert "has collapsed" in capsys.readouterr().out
    overrides = ("method.stop_gradient=false", "evaluate.controls=false", "collapse.action=warn")
    assert train("collapsing", *overrides, f"train.max_steps={status['step'] + 5}")[0] == 0
    assert last(folder, "end")["status"] == "done"
    # Far above chance all the same: 44 against 64 after all these epochs on one machine.
    assert last(folder, "end")["knn_top1"] < last(healthy[1], "end")["knn_top1"] - 10
    # A collapsed run's loss looks better than the healthy one's.
    assert last(folder, "train")["loss"] < last(healthy[1], "train")["loss"]


HEADS = "method.projector={layers: 2, hidden: 256, out: 64, norm: hidden}"
COLLAPSES = {
    "byol": (HEADS, "method.predictor=null", "method.momentum=0.97"),
    "swav": (HEADS, "method.prototypes=64", "method.epsilon=0.02", "method.sinkhorn_iterations=0"),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_method_without_what_prevents_its_collapse_is_told(train, name, capsys):
    overrides = (f"method.name={name}", *COLLAPSES[name], "optimizer.base_lr=0.2", "evaluate.controls=false")
    code, folder = train(f"collapsing-{name}", *overrides)
    assert code == 3
    status = json.loads((folder / "status.json").read_text())
    assert status["std_ratio"] < 0.1
    assert status["step"] <= 3 * 62
    assert {"byol": "keep a predictor", "swav": "method.sinkhorn_iterations=3"}[name] in capsys.readouterr().out


def cifar(folder, images):
    """1,000 CIFAR-10 images where they lie beside the checkout, else as many demo images."""
    archive = SHARED / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        return few_of_each_class(folder, images / "train", 100)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.isfile() and "train" in parts and int(parts[-1].split(".")[0]) < 100:
                tar.extract(member, folder, filter="data")
    return folder


def few_of_each_class(folder, images, count):
    for path in sorted(images.glob("*/*")):
        if int(path.stem) < count:
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.parent.name)
    return folder


def fifty_photographs(folder, images):
    """50 ImageNet photographs where they lie beside the checkout, else as many demo images."""
    photographs = sorted((SHARED / "imagenet-sample").glob("*/*"))[:50]
    if not photographs:
        return few_of_each_class(folder, images / "train", 5)
    folder.mkdir()
    for path in photographs:
        shutil.copy(path, folder / path.name)
    return folder


CALIBRATION = {
    "small batch": (lambda folder, images: few_of_each_class(folder, images / "train", 64), 16, 4),
    "cifar": (cifar, 32, 5),
    "fifty photographs": (fifty_photographs, 16, 42),
    "another seed": (lambda folder, images: few_of_each_class(folder, images / "val", 100), 32, 5),
}


@pytest.mark.parametrize("kind", CALIBRATION)
def test_the_guard_is_silent_on_healthy_runs(kind, images, train, tmp_path):
    """Judged at least twice each, two measures in a row stop a run."""
    make, batch_size, epochs = CALIBRATION[kind]
    folder = make(tmp_path / "images", images)
    overrides = ("data.val=null", "data.demo_seed=null", f"data.train={folder}", "evaluate.controls=false")
    code, run = train(
        kind.replace(" ", "_"), *overrides, f"train.batch_size={batch_size}", f"train.epochs={epochs}", "train.seed=7"
    )
    assert code == 0
    assert [line for line in lines(run) if line["kind"] == "warning"] == []
    judged = [line for line in lines(run) if line["kind"] == "collapse" and line["step"] >= 100]
    assert len(judged) >= 2
    assert min(line["std_ratio"] for line in judged) > 0.2
