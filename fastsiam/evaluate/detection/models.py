"""Detectors of torchvision around an encoder: Faster R-CNN and Mask R-CNN, with a feature pyramid or in C4's form.

C4 is the form of the detection results of MoCo and SimSiam (detectron2's R50-C4 with MoCo's extra norm): the first
three stages are the body, RPN works on their output of stride 16, and the fourth stage is computed on each region,
14 px to 7 px, followed by one more batch norm. torchvision has no such model. What is torchvision's here and not
detectron2's: its smooth L1 loss with beta 1/9, and in the pyramid RoIAlign without half-pixel shift.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, RoIAlign
from torchvision.transforms.v2 import functional as F

from fastsiam.config.views import IMAGENET_MEAN, IMAGENET_STD
from fastsiam.errors import UserError

ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
_MODULES = {"stem": ("conv1", "bn1")}


@dataclass(frozen=True)
class DetectorSettings:
    """What makes a detector; the numbers are those of detectron2's configs and of torchvision."""

    classes: int
    """Without the background."""
    body: str = "c4"
    """c4 or fpn."""
    masks: bool = False
    freeze: str = "none"
    """none, or the last of `STAGES` that is not trained, as are those before it."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    test_short_side: int = 800
    long_side: int = 1333
    smallest_anchor: int = 32
    """Side in pixels; four more sizes follow, each twice as large."""
    regions: int = 512
    """Regions of an image that the head is trained on."""
    proposals: int = 1000
    """Proposals of an image that the head sees in evaluation."""
    channels: int = 256
    """Of the feature pyramid and its heads."""


def check_encoder(description: dict) -> None:
    """Raises `UserError` for an encoder that no detector here can be built around."""
    name, stem = description["encoder"], description["stem"]
    if name not in ENCODERS:
        text = f"ENCODER: detect builds its detectors around {', '.join(ENCODERS)}, and this is {name}"
        raise UserError(text, "no-detector")
    if stem != "imagenet":
        raise UserError(
            f"ENCODER: its stem is {stem}, which keeps the resolution that detectors expect to be a fourth after the "
            "stem; pretrain with model.stem=imagenet",
            "no-detector",
        )


def build_detector(encoder: nn.Module, settings: DetectorSettings) -> GeneralizedRCNN:
    """A detector whose body is `encoder`, a torchvision ResNet, which becomes a part of it.

    In training mode it maps lists of images fp32 [3, H, W], RGB in [0, 1], of sizes as they are, and of targets to a
    dict of losses; in evaluation mode images to a dict of `boxes` [N, 4] in their pixels, `labels`, `scores` and
    `masks` [N, 1, H, W]. Every batch norm of the encoder is trained, unless `freeze` says otherwise, and every new
    layer with a convolution has one (MoCo, arXiv 1911.05722, section 4.2).
    """
    encoder.requires_grad_(True)
    _freeze(encoder, settings.freeze)
    model = (_c4 if settings.body == "c4" else _with_pyramid)(encoder, settings)
    # torchvision makes anchors in the dtype of the features, and boxes in that of the heads' outputs: in bf16 their
    # coordinates would be multiples of 4 from 512 pixels on.
    for module in (model.backbone, model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        if module is not None:
            module.register_forward_hook(_in_fp32)
    return model


def _freeze(encoder, last):
    for stage in STAGES[: STAGES.index(last) + 1] if last != "none" else ():
        for name in _MODULES.get(stage, (stage,)):
            encoder.get_submodule(name).requires_grad_(False)
            for path, module in list(encoder.get_submodule(name).named_modules(prefix=name)):
                if isinstance(module, nn.BatchNorm2d):
                    encoder.set_submodule(path, _frozen(module))


def _frozen(norm):
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
    frozen.load_state_dict({name: value for name, value in norm.state_dict().items() if name in frozen.state_dict()})
    return frozen


def _in_fp32(module, inputs, output):
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, dict):
        return OrderedDict((name, value.float()) for name, value in output.items())
    return type(output)(_in_fp32(module, inputs, part) for part in output)


class _Body(nn.Sequential):
    """The encoder up to its third stage, by the encoder's own names."""

    def __init__(self, encoder):
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        super().__init__(OrderedDict((name, getattr(encoder, name)) for name in names))
        self.out_channels = encoder.num_features // 2


def _c4(encoder, settings):
    body = _Body(encoder)
    sizes = tuple(settings.smallest_anchor << power for power in range(5))
    res5 = nn.Sequential(OrderedDict(layer4=encoder.layer4, norm=nn.BatchNorm2d(encoder.num_features)))
    predictor = faster_rcnn.FastRCNNPredictor(encoder.num_features, settings.classes + 1)
    masks = mask_rcnn.MaskRCNNPredictor(encoder.num_features, 256, settings.classes + 1) if settings.masks else None
    heads = _Res5Heads(_Pool(14, 1 / 16, sampling_ratio=0, aligned=True), res5, predictor, *_head_numbers(settings))
    heads.mask_predictor = masks
    return _assembled(body, AnchorGenerator((sizes,), ((0.5, 1.0, 2.0),)), heads, settings, {True: 12000, False: 6000})


def _with_pyramid(encoder, settings):
    widths, channels = [encoder.num_features // part for part in (8, 4, 2, 1)], settings.channels
    stages = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    body = BackboneWithFPN(encoder, stages, widths, channels, norm_layer=nn.BatchNorm2d)
    sizes = tuple((settings.smallest_anchor << power,) for power in range(5))
    levels = list(stages.values())
    heads = RoIHeads(
        MultiScaleRoIAlign(levels, 7, 2),
        faster_rcnn.FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], nn.BatchNorm2d),
        faster_rcnn.FastRCNNPredictor(4 * channels, settings.classes + 1),
        *_head_numbers(settings),
    )
    if settings.masks:
        heads.mask_roi_pool = MultiScaleRoIAlign(levels, 14, 2)
        heads.mask_head = mask_rcnn.MaskRCNNHeads(channels, [channels] * 4, 1, nn.BatchNorm2d)
        heads.mask_predictor = mask_rcnn.MaskRCNNPredictor(channels, channels, settings.classes + 1)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return _assembled(body, anchors, heads, settings, {True: 2000, False: 1000})


def _head_numbers(settings):
    """Overlaps of objects and of background, regions and share of objects, box weights, least score, NMS, boxes."""
    return 0.5, 0.5, settings.regions, 0.25, None, 0.05, 0.5, 100


def _assembled(body, anchors, heads, settings, before_nms):
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(body.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": before_nms[True], "testing": before_nms[False]},
        post_nms_top_n={"training": 2000, "testing": settings.proposals},
        nms_thresh=0.7,
    )
    return GeneralizedRCNN(body, rpn, heads, Transform(settings))


class Transform(GeneralizedRCNNTransform):
    """Normalises and pads; resizes in evaluation alone, with antialiasing as the training's transforms do."""

    def __init__(self, settings: DetectorSettings):
        super().__init__(settings.test_short_side, settings.long_side, list(settings.mean), list(settings.std))

    def resize(self, image, target=None):
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        resized = F.resize(image, [max(1, int(height * scale)), max(1, int(width * scale))], antialias=True)
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], (height, width), resized.shape[-2:])
        return resized, target


class _Pool(RoIAlign):
    """RoIAlign on the single map of a body, by the interface of torchvision's heads."""

    def forward(self, features, boxes, image_shapes):
        (only,) = features.values()
        return super().forward(only, boxes)


class _Res5Heads(RoIHeads):
    """detectron2's Res5ROIHeads: boxes and masks share the fourth stage, which sees each region once."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        shared = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(shared.mean((2, 3)))
        if not self.training:
            found = zip(*self.postprocess_detections(logits, deltas, proposals, image_shapes), strict=True)
            found = [{"boxes": boxes, "scores": scores, "labels": classes} for boxes, scores, classes in found]
            return self._with_masks(found, features, image_shapes), {}
        classifier, box_reg = fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": classifier, "loss_box_reg": box_reg}
        if self.mask_predictor is not None:
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(shared[torch.cat(labels) > 0]),
                [boxes[label > 0] for boxes, label in zip(proposals, labels, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [match[label > 0] for match, label in zip(matched, labels, strict=True)],
            )
        return [], losses

    def _with_masks(self, found, features, image_shapes):
        if self.mask_predictor is not None:
            pooled = self.box_roi_pool(features, [one["boxes"] for one in found], image_shapes)
            logits = self.mask_predictor(self.box_head(pooled))
            masks = maskrcnn_inference(logits, [one["labels"] for one in found])
            for one, mask in zip(found, masks, strict=True):
                one["masks"] = mask
        return found
