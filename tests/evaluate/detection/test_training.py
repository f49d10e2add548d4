"""The schedule of detectron2's configs, resuming, losses that are not finite, exact statistics, several ranks."""

import copy

import pytest
import torch
from torch import nn

from fastsiam.config.schema import TrainConfig
from fastsiam.evaluate.detection.coco_file import read_coco
from fastsiam.evaluate.detection.evaluation import detect
from fastsiam.evaluate.detection.loader import TrainingImages
from fastsiam.evaluate.detection.models import DetectorSettings, build_detector
from fastsiam.evaluate.detection.training import Batches, Schedule, Training, build_optimizer
from fastsiam.models.encoder import build_encoder
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from tests.support.gloo_ranks import world as world_of_group
from tests.support.refusals import refuses
from tests.support.shapes import write_coco

CPU = TrainConfig(batch_size=2, epochs=1, device="cpu", precision="fp32", compile="off")
SMALL = {"regions": 8, "proposals": 8, "channels": 16, "smallest_anchor": 8, "test_short_side": 64, "long_side": 96}


def test_the_rate_is_detectron2s():
    """VOC's 24k iterations at 16 images: 100 of warm-up, a tenth from 18,000 on, a hundredth from 22,000 on."""
    voc = Schedule(24_000, 16)
    known = {0: 2e-5, 50: 0.02 * 0.5005, 100: 0.02, 17_999: 0.02, 18_000: 0.002, 21_999: 0.002, 22_000: 2e-4}
    assert {iteration: voc.rate(iteration) for iteration in known} == pytest.approx(known)
    assert Schedule(24_000, 4).rate(200) == pytest.approx(0.005)


def test_norms_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    decayed, norms = build_optimizer(model, Schedule(1, 16)).param_groups
    assert (decayed["weight_decay"], norms["weight_decay"], decayed["momentum"]) == (1e-4, 0.0, 0.9)
    assert [len(group["params"]) for group in (decayed, norms)] == [2, 2]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), 4, seed=1)


def training(path, world=None, iterations=4, lr=0.02, precise_bn=0):
    runtime = Runtime.of(CPU, world)
    images = TrainingImages(read_coco(path, path.parent, "--train").images, (64,), 96, 5, masks=False)
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", "imagenet", None, False)
    model = build_detector(encoder, DetectorSettings(3, "fpn", freeze="layer4", **SMALL))
    schedule = Schedule(iterations, 2, lr, warmup=1, precise_bn=precise_bn)
    return Training(model, Batches(images, 2, runtime, 0, 5), schedule, runtime)


def test_a_resumed_training_is_the_undisturbed_one(path, tmp_path):
    settings = {"lr": 0.02}
    whole = training(path)
    whole.run(lambda line: None, 1e9, None, settings)
    first = training(path)
    # Saves after each iteration, and ends after the second.
    first._batches.of = lambda begin, end, of=first._batches.of: of(begin, 2)
    first.run(lambda line: None, 0.0, tmp_path, settings)
    again = training(path)
    assert again.resume(tmp_path, settings)
    assert again.iteration == 2
    again.run(lambda line: None, 1e9, None, settings)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    with refuses("other-settings", "--resume") as caught:
        again.resume(tmp_path, {"lr": 0.1})
    assert "(lr 0.02, now 0.1)" in str(caught.value)
    assert not again.resume(tmp_path / "nowhere", settings)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with refuses("damaged-checkpoint", "--resume") as caught:
        again.resume(tmp_path, settings)
    assert str(caught.value).endswith("leave --resume out to start over")


def test_a_loss_that_is_not_finite_is_said(path):
    with refuses("loss-not-finite", "--lr") as caught:
        training(path, lr=1e12).run(lambda line: None, 1e9, None, {})
    assert "is not finite (" in str(caught.value)


def test_exact_statistics_are_the_mean_of_those_of_batches(path):
    """Of the pyramid's first norm, whose input does not depend on other norms that are trained."""
    one = training(path, iterations=1, precise_bn=3)
    layer = one.model.backbone.fpn.inner_blocks[3]
    seen = []
    hook = layer[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().double()))
    one.use_exact_statistics()
    hook.remove()
    means = torch.stack([values.mean((0, 2, 3)) for values in seen])
    variances = torch.stack([values.var((0, 2, 3)) for values in seen])
    assert len(seen) == 3
    assert torch.allclose(layer[1].running_mean.double(), means.mean(0), atol=1e-6)
    assert torch.allclose(layer[1].running_var.double(), variances.mean(0), rtol=1e-5)
    assert layer[1].momentum == 0.1


def on_ranks(path):
    mine = training(path, world_of_group(), iterations=2)
    mine.run(lambda line: None, 1e9, None, {})
    mine.use_exact_statistics()
    images = read_coco(path, path.parent, "--val").images
    found = detect(mine.model, images, Runtime.of(CPU, world_of_group()), 1, 0)
    return mine.model.state_dict(), [one.boxes for one in found]


@pytest.mark.slow
def test_ranks_have_one_model_and_share_the_evaluation(path, ranks):
    (state, boxes), (other, others) = ranks(2, on_ranks, path)
    assert all(torch.equal(state[name], other[name]) for name in state if "num_batches" not in name)
    assert len(boxes) == len(others) == 4
    assert all((mine == theirs).all() for mine, theirs in zip(boxes, others, strict=True))
    alone = training(path)
    alone.model.load_state_dict(copy.deepcopy(state))
    expected = detect(alone.model, read_coco(path, path.parent, "--val").images, Runtime.of(CPU, World()), 1, 0)
    assert all((mine == one.boxes).all() for mine, one in zip(boxes, expected, strict=True))
