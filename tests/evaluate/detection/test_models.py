"""Detectors around an encoder: its features, norms and trained tensors; boxes and anchors in fp32."""

import copy

import pytest
import torch
from torch import nn

from fastsiam.evaluate.detection.facts import check_detector
from fastsiam.evaluate.detection.models import DetectorSettings, build_detector, check_encoder
from fastsiam.models.encoder import build_encoder
from tests.support.refusals import refuses

SMALL = {"regions": 8, "proposals": 8, "channels": 16, "smallest_anchor": 8, "test_short_side": 64, "long_side": 96}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    built = build_encoder("resnet18", "imagenet", None, False)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return built.eval()


def built(encoder, **changes):
    return build_detector(copy.deepcopy(encoder), DetectorSettings(3, **(SMALL | changes)))


def batch(boxes=1):
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    targets = [
        {
            "boxes": torch.tensor([[3.0, 4, 30, 33]])[:count],
            "labels": torch.tensor([2])[:count],
            "masks": torch.ones(count, *image.shape[1:], dtype=torch.uint8),
        }
        for image, count in zip(images, (boxes, 0), strict=True)
    ]
    return images, targets


@torch.no_grad()
def test_features_are_those_of_the_encoder(encoder):
    images = torch.rand(2, 3, 64, 96)
    stages = [encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))]
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        stages.append(stage(stages[-1]))
    c4 = built(encoder).eval()
    assert torch.equal(c4.backbone(images), stages[3])
    assert torch.equal(c4.roi_heads.box_head.layer4(stages[3]), stages[4])
    of_pyramid = built(encoder, body="fpn").eval().backbone.body(images)
    assert all(torch.equal(mine, known) for mine, known in zip(of_pyramid.values(), stages[1:], strict=True))


@pytest.mark.parametrize(("body", "masks", "new_norms"), [("c4", True, 1), ("fpn", True, 16), ("fpn", False, 12)])
def test_norms_and_trained_tensors(encoder, body, masks, new_norms):
    weights = encoder.state_dict()
    free = check_detector(built(encoder, body=body, masks=masks), weights, "none")
    # ResNet-18: 20 convolutions, and 20 norms of 5 tensors.
    assert free["loaded_tensors"] == len(weights) == 120
    assert (free["frozen_tensors"], free["norms"]) == (0, {"BatchNorm2d": 20 + new_norms})
    model = built(encoder, body=body, masks=masks, freeze="layer2")
    held = check_detector(model, weights, "layer2")
    # The stem and two stages of two blocks: 10 convolutions with their norms, one of them a shortcut.
    assert (held["frozen_tensors"], held["norms"]["FrozenBatchNorm2d"]) == (10, 10)
    assert free["trained_tensors"] - held["trained_tensors"] == 30
    before = {name: value.clone() for name, value in model.state_dict().items() if "layer2" in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sum(model.train()(*batch()).values()).backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_another_weight_or_norm_or_frozen_tensor_is_noticed(encoder):
    weights = encoder.state_dict()
    with pytest.raises(AssertionError, match="other values than the encoder"):
        check_detector(built(encoder), weights | {"layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3)}, "none")
    model = built(encoder)
    model.backbone.layer1.requires_grad_(False)
    with pytest.raises(AssertionError, match="frozen are 12 tensors, not 0"):
        check_detector(model, weights, "none")
    model = built(encoder)
    model.roi_heads.box_head.norm = nn.GroupNorm(2, 512)
    with pytest.raises(AssertionError, match="GroupNorm"):
        check_detector(model, weights, "none")


@pytest.mark.parametrize("body", ["c4", "fpn"])
@pytest.mark.parametrize("boxes", [0, 1])
def test_images_without_objects_train(encoder, body, boxes):
    """Heads for masks see no region then."""
    torch.manual_seed(0)
    losses = built(encoder, body=body, masks=True).train()(*batch(boxes))
    assert losses.keys() == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
    }  # fmt: skip
    assert torch.isfinite(sum(losses.values()))
    sum(losses.values()).backward()


def test_res5_heads_share_the_fourth_stage_with_the_masks(encoder):
    """In training each region passes it once; the losses are those of torchvision's heads with the same parts."""
    model = built(encoder, masks=True).train()
    heads, calls = model.roi_heads, []
    heads.box_head.register_forward_hook(lambda *_: calls.append(1))
    images, targets = batch()
    torch.manual_seed(3)
    mine = model(images, targets)
    assert len(calls) == 1

    class Mean(nn.Module):
        def forward(self, regions):
            return heads.box_head(regions).mean((2, 3))

    plain = copy.copy(heads)
    plain.__class__ = type(heads).__mro__[1]
    plain._modules = dict(heads._modules)
    plain.box_head, plain.mask_roi_pool, plain.mask_predictor = Mean(), None, None
    model.roi_heads = plain
    torch.manual_seed(3)
    theirs = model(images, targets)
    for name in ("loss_classifier", "loss_box_reg"):
        assert mine[name].item() == pytest.approx(theirs[name].item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("body", ["c4", "fpn"])
def test_anchors_and_boxes_are_fp32_under_autocast(encoder, body):
    """torchvision makes both in the dtype of the network: in bf16 anchors at 600 px are 4 px off."""
    model, seen = built(encoder, body=body).eval(), []
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    model.rpn.register_forward_hook(lambda module, inputs, output: seen.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        (one,) = model([torch.rand(3, 64, 90)])
    assert {*(boxes.dtype for boxes in seen), one["boxes"].dtype} == {torch.float32}
    assert len(seen) == 2


def test_boxes_of_evaluation_are_in_the_pixels_of_the_image(encoder):
    """An image of half the size has the same features after resizing, and boxes of half the size."""
    torch.manual_seed(0)
    model = built(encoder, test_short_side=64, long_side=96).eval()
    model.roi_heads.score_thresh = 0.0
    small = torch.rand(3, 32, 48)
    large = nn.functional.interpolate(small[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
    with torch.no_grad():
        ours, theirs = model([small])[0], model([large])[0]
    assert len(ours["boxes"]) == len(theirs["boxes"]) > 0
    assert torch.allclose(2 * ours["boxes"], theirs["boxes"], atol=0.05)
    _, height, width = small.shape
    assert (ours["boxes"].amax(0) <= torch.tensor([width, height, width, height])).all()


@pytest.mark.parametrize(
    ("name", "stem"), [("resnext50_32x4d", "imagenet"), ("resnet18", "cifar"), ("cifar_resnet8", "cifar")]
)
def test_other_encoders_are_refused(name, stem):
    with refuses("no-detector", "ENCODER"):
        check_encoder({"encoder": name, "stem": stem})
    check_encoder({"encoder": "resnet152", "stem": "imagenet"})
