"""The ledger of bytes against counts by hand, and the bytes of ResNet-18's step against what they were."""

import json

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from benchmarks.readme.captions import number
from benchmarks.tables import TABLES, render
from benchmarks.traffic import __main__ as traffic
from benchmarks.traffic import classes
from benchmarks.traffic.classes import class_of
from benchmarks.traffic.count import DGRAD, GENERATED, WGRAD, Launch
from benchmarks.traffic.gpus import GPUS
from benchmarks.traffic.optimizer import launches_of_optimizer
from benchmarks.traffic.schedule import schedule
from benchmarks.traffic.step import count
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.residual import fuse_pointwise, fuse_residual_blocks

H200 = GPUS["h200"]
# Of a step of 64 images of 32 px at torch 2.14, read and written, and at the fullest moment.
R18_BYTES, R18_PEAK = 3_325_258_780, 277_797_248


def launch(*operators, backward=False, reduces=False, images=True, channels=True, kernel=GENERATED):
    return Launch(kernel, backward, 1, 1, 0, reduces, frozenset(operators), images, channels)


@pytest.mark.slow
def test_a_convolution_with_batch_norm_and_relu_moves_what_a_pencil_says():
    """64 images of 56 px in bf16, 16 to 32 channels by a 1x1 convolution: x and y of 6.4 and 12.8 MB."""
    net = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    net.to(memory_format=torch.channels_last)
    images = torch.empty(64, 16, 56, 56, dtype=torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    x, y, weight = 64 * 16 * 56 * 56 * 2, 64 * 32 * 56 * 56 * 2, 32 * 16 * 2
    # Of the ReLU: a byte an element.
    mask = y // 2
    found = schedule(net, (images,), H200)
    by_class = {}
    for one in found.launches:
        by_class.setdefault(class_of(one), []).append(one)
    operations = 2 * 64 * 56 * 56 * 16 * 32
    exact = {
        classes.FORWARD: (x + weight, y), classes.OF_INPUTS: (y + weight, x), classes.OF_WEIGHTS: (y + x, weight),
    }  # fmt: skip
    for kind, moved in exact.items():
        (only,) = by_class[kind]
        assert (only.read, only.written, only.operations) == (*moved, operations)
    # Besides: numbers of a channel, and partial sums of at most a twentieth.
    for kind, read, written in (
        (classes.STATISTICS, y, 0),
        (classes.APPLY, y, y + mask),
        (classes.REDUCTIONS, 2 * y + mask, 0),
        (classes.BACKWARD_APPLY, 2 * y + mask, y),
    ):
        biggest = max(by_class[kind], key=lambda one: one.moved)
        assert read <= biggest.read <= read + 1024
        assert written <= biggest.written <= written + y // 20
    casts = [one.moved for one in by_class[classes.OTHER]]
    assert casts == [3 * weight, 3 * weight]
    # Besides: the weights in bf16, and numbers of a channel.
    assert y + mask + weight <= found.saved_bytes <= y + mask + weight + 1024
    assert found.peak_bytes >= found.saved_bytes + y


@pytest.mark.slow
def test_bottlenecks_without_the_sides_of_their_last_convolution_move_what_a_pencil_says():
    """64 images of 28 px, two views, 16 channels inside and 64 outside: 1.6 MB, and four times that."""
    blocks = split_statistics(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)), 2)
    fuse_pointwise(fuse_residual_blocks(blocks.to(memory_format=torch.channels_last)), "two blocks")
    blocks[0].following = (blocks[1],)
    images = torch.empty(64, 64, 28, 28, dtype=torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    x, wide, weight, products = 64 * 16 * 28 * 28 * 2, 64 * 64 * 28 * 28 * 2, 64 * 16 * 2, 2 * 64 * 28 * 28 * 16
    moved = {launch.kernel: launch for launch in schedule(blocks, (images,), H200).launches}
    for name, read, written, operations in (
        ("pointwise_gram", x, 0, 16 * products),
        ("pointwise_join", x + wide + weight, wide, 64 * products),
        ("pointwise_rows_product", x + wide, 0, 64 * products),
        ("pointwise_dgrad", x + wide, x, (64 + 16) * products),
        ("pointwise_join_dgrad", x + 2 * wide + weight, wide, 64 * products),
    ):
        launch = moved[name]
        # Besides: numbers of a channel, matrices of a view, and of 264 programs a matrix each.
        assert read <= launch.read <= read + 12_000
        assert written <= launch.written <= written + 264 * 64 * 16 * 4
        assert launch.operations == operations
    assert {class_of(launch) for name, launch in moved.items() if name.startswith("pointwise_")} == {
        classes.STATISTICS, classes.FORWARD, classes.OF_WEIGHTS, classes.OF_INPUTS,
    }  # fmt: skip


@pytest.mark.slow
def test_a_bottleneck_keeps_no_results_of_batch_norm_but_its_own_as_a_pencil_says():
    """64 images of 28 px, two views, 16 channels inside and 64 outside: 1.6 MB, and four times that."""
    block = split_statistics(nn.Sequential(Bottleneck(64, 16)).to(memory_format=torch.channels_last), 2)
    images = torch.empty(64, 64, 28, 28, dtype=torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    x, wide = 64 * 16 * 28 * 28 * 2, 64 * 64 * 28 * 28 * 2
    found = schedule(fuse_residual_blocks(block), (images,), H200)
    again = [launch for launch in found.launches if class_of(launch) == classes.AGAIN]
    # Besides: statistics and numbers of a channel.
    assert [launch.backward for launch in again] == [True, True]
    assert all(x <= launch.read <= x + 1024 and launch.written == x for launch in again)
    # Of the convolutions' results the two inner ones and the last, and the block's own.
    assert 2 * x + 2 * wide <= found.saved_bytes <= 2 * x + 2 * wide + 12_000


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="counted with torch 2.14")
def test_the_step_of_resnet_18_moves_and_keeps_no_more_bytes_than_it_did():
    """A change that needs fewer lowers the number; one that needs 1 % more needs a reason."""
    counted = count("r18_cifar10_800ep", "h200", ["train.batch_size=64"])
    moved = sum(numbers["read_bytes"] + numbers["written_bytes"] for numbers in counted["classes"].values())
    assert 0.97 * R18_BYTES <= moved <= 1.01 * R18_BYTES
    assert 0.97 * R18_PEAK <= counted["peak_bytes"] <= 1.01 * R18_PEAK
    convolutions = (classes.FORWARD, classes.OF_INPUTS, classes.OF_WEIGHTS)
    assert [counted["classes"][kind]["launches"] for kind in convolutions] == [20, 19, 20]


@pytest.mark.slow
def test_checkpointed_blocks_lower_the_peak_of_a_compiled_step():
    """The inputs of the blocks are kept, and one block's activations at a time: 0.63 of the peak without."""
    counted = count("r18_cifar10_800ep", "h200", ["train.batch_size=64", "train.checkpoint_activations=true"])
    assert counted["peak_bytes"] <= 0.65 * R18_PEAK


def test_launches_have_their_classes():
    formula = ("sub", "mul", "add", "relu")
    assert class_of(launch(kernel="convolution")) == classes.FORWARD
    assert class_of(launch(kernel=DGRAD, backward=True)) == classes.OF_INPUTS
    assert class_of(launch(kernel=WGRAD, backward=True)) == classes.OF_WEIGHTS
    assert class_of(launch(kernel="mm", images=False)) == classes.REST
    assert class_of(launch("var_mean", reduces=True)) == classes.STATISTICS
    assert class_of(launch(*formula)) == classes.APPLY
    # The average pool is fused with the last one.
    assert class_of(launch(*formula, "mean", reduces=True)) == classes.APPLY
    assert class_of(launch("where", "mul", "sub", "sum", backward=True, reduces=True)) == classes.REDUCTIONS
    assert class_of(launch("sum", backward=True, images=False)) == classes.REDUCTIONS
    assert class_of(launch("where", "mul", "sub", backward=True)) == classes.BACKWARD_APPLY
    assert class_of(launch("add", "where", backward=True)) == classes.OTHER
    assert class_of(launch("convert_element_type")) == classes.OTHER
    assert class_of(launch("_low_memory_max_pool_with_offsets")) == classes.MAX_POOL
    assert class_of(launch("copy_", "select", "sub", "mul")) == classes.REST
    assert class_of(launch("sub", "mul", images=False, channels=False)) == classes.REST


def test_a_launch_takes_the_longest_of_memory_arithmetic_and_its_start():
    assert H200.seconds(43 * 10**9, 10**9) == pytest.approx(0.01)
    assert H200.seconds(10**9, 790 * 10**10) == pytest.approx(0.01)
    assert H200.seconds(8, 0) == 2e-6


def test_the_optimizers_step_is_counted(monkeypatch):
    """Fused SGD reads weight, gradient and momentum and writes two of them; CUDA 12 took 48 tensors a launch."""
    weights = [nn.Parameter(torch.zeros(3, 5)) for _ in range(100)]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True)
    for cuda, number_of_launches in (("13.0", 1), ("12.8", 3)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        launches = launches_of_optimizer(optimizer)
        assert len(launches) == number_of_launches
        assert sum(one.read for one in launches) == pytest.approx(3 * 100 * 15 * 4, abs=3)
        assert sum(one.written for one in launches) == pytest.approx(2 * 100 * 15 * 4, abs=3)
    # 160 chunks of 65,536 for each of 3 tensors: 320 a launch.
    large = [nn.Parameter(torch.zeros(160 << 16)) for _ in range(3)]
    assert len(launches_of_optimizer(torch.optim.SGD(large, lr=0.1, momentum=0.9, fused=True))) == 2


COUNTED = {
    "params": {"config": "c", "batch": 10, "gpu": "h200"},
    "classes": {
        classes.FORWARD: {"launches": 2, "read_bytes": 60, "written_bytes": 40, "operations": 7, "seconds": 0.25},
        classes.OPTIMIZER: {"launches": 1, "read_bytes": 50, "written_bytes": 50, "operations": 0, "seconds": 0.25},
    },
    "saved_bytes": 5,
    "peak_bytes": 6,
}


def test_lines_add_up_and_compare():
    other = json.loads(json.dumps(COUNTED))
    other["classes"][classes.FORWARD] |= {"launches": 4, "read_bytes": 360}
    lines = traffic.lines_of(COUNTED, other)
    whole = lines[traffic.WHOLE]
    assert (whole["bytes"], whole["bytes_per_image"], whole["launches"], whole["operations"]) == (200, 20, 3, 7)
    assert whole["images_per_second"] == 20
    assert (lines[classes.FORWARD]["bytes_ratio"], lines[classes.FORWARD]["launches_ratio"]) == (0.25, 0.5)
    assert (whole["bytes_ratio"], whole["launches_ratio"]) == (0.4, 0.6)
    assert "0.400x" in traffic.table(lines)


def test_an_unknown_commit_is_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(traffic, "count", lambda *arguments: COUNTED)
    assert traffic.main(["--against", "no-such-name"]) == 2
    assert capsys.readouterr().err.endswith("[no-such-commit]\n")


def test_another_commit_is_imported_in_its_own_process():
    """Its fastsiam, and the benchmarks of this checkout; the worktree is gone afterwards."""
    with traffic.worktree("HEAD") as imports:
        assert (imports / "fastsiam/kernels/cosine.py").is_file()
        assert (imports / "benchmarks/traffic/step.py").is_file()
        tree = (imports / "fastsiam").resolve().parent
        assert tree != traffic.CHECKOUT
    assert not tree.exists()


def test_the_command_writes_lines_that_the_table_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "count", lambda *arguments: COUNTED)
    assert traffic.main(["train.seed=1", "--config", "r50_100ep", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "traffic.jsonl").read_text().splitlines()]
    assert {line["params"]["overrides"] for line in lines} == {"train.seed=1"}
    text = render(TABLES["traffic"], lines)
    assert f"| {traffic.WHOLE} | 3 | {number(200e-9)} |" in text
