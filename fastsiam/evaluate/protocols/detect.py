"""Transfer to object detection: trains a detector around the encoder, all of it, and measures its average precision.

Faster R-CNN or Mask R-CNN of torchvision, with C4 or a feature pyramid, by the schedules of MoCo's and SimSiam's
results (arXiv 1911.05722, 2011.10566 appendix C).
"""

import argparse
import contextlib
import copy
import math

import torch

from fastsiam.config.yaml_file import expand_home
from fastsiam.data.build import workers_of
from fastsiam.errors import UserError
from fastsiam.evaluate.detection import evaluation, precision
from fastsiam.evaluate.detection.annotations import check_masks, without_outlines
from fastsiam.evaluate.detection.facts import check_detector
from fastsiam.evaluate.detection.loader import TrainingImages
from fastsiam.evaluate.detection.locate import read_both
from fastsiam.evaluate.detection.models import STAGES, DetectorSettings, Transform, build_detector, check_encoder
from fastsiam.evaluate.detection.training import Batches, Schedule, Training, fill_statistics
from fastsiam.evaluate.protocols.arguments import add_encoder_arguments, add_out_argument, check_least
from fastsiam.evaluate.protocols.inputs import FILL_BATCHES, opened
from fastsiam.evaluate.protocols.result import publish, results_folder, written
from fastsiam.run.weight_files import sha256_of_tensors
from fastsiam.runtime.cores import usable_cores
from fastsiam.runtime.distributed import World

# What a format of annotations stands for: VOC 07+12 of MoCo's configs, COCO's 1x of detectron2's.
_PRESETS = {
    "voc": {"iterations": 24_000, "steps": (18 / 24, 22 / 24), "short_sides": tuple(range(480, 801, 32))},
    "coco": {"iterations": 90_000, "steps": (6 / 9, 8 / 9), "short_sides": tuple(range(640, 801, 32))},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_encoder_arguments(parser, batch_size=16, views=False)
    _add_data_arguments(parser)
    add_out_argument(parser)
    text = "%(default)s; mask_rcnn needs COCO's segmentations"
    parser.add_argument("--model", choices=("faster_rcnn", "mask_rcnn"), default="faster_rcnn", help=text)
    text = "c4: fourth stage on each region; fpn: feature pyramid (%(default)s)"
    parser.add_argument("--body", choices=("c4", "fpn"), default="c4", help=text)
    text = "the last stage of the encoder that is not trained (%(default)s)"
    parser.add_argument("--freeze", choices=("none", *STAGES), default="none", help=text)
    parser.add_argument("--iterations", type=int, metavar="N", help="(24,000 for VOC, 90,000 for COCO)")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate at 16 images in a batch (%(default)s)")
    text = "iterations in which the rate rises linearly (%(default)s)"
    parser.add_argument("--warmup", type=int, default=100, metavar="N", help=text)
    text = "shares of the iterations after which the rate is a tenth (18/24 22/24 for VOC, 6/9 8/9 for COCO)"
    parser.add_argument("--steps", type=float, nargs="*", metavar="SHARE", help=text)
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of all but norms (%(default)s)")
    text = "iterations whose mean statistics batch norms have in evaluation (200, and no more than --iterations)"
    parser.add_argument("--precise-bn", type=int, metavar="N", help=text)
    _add_size_arguments(parser)
    text = "minutes between checkpoints (%(default)s)"
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0, metavar="M", help=text)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of the results folder")
    text = "computes COCO's average precision (%(default)s)"
    parser.add_argument("--evaluator", choices=precision.EVALUATORS, default="pycocotools", help=text)


def _add_data_arguments(parser):
    for part in ("train", "val"):
        text = "a JSON file in COCO's format, a folder with one, or folders in VOC's format"
        parser.add_argument(f"--{part}", metavar="PATH", type=expand_home, nargs="+", required=True, help=text)
        text = f"images of --{part}'s JSON file (default: where COCO has them, or beside it)"
        parser.add_argument(f"--{part}-images", metavar="FOLDER", type=expand_home, help=text)
        default = "trainval where VOC has a test split, else train" if part == "train" else "test, else val"
        parser.add_argument(f"--{part}-split", metavar="NAME", help=f"of a folder in VOC's format ({default})")


def _add_size_arguments(parser):
    text = (
        "short sides of training images in pixels, one drawn for each (480 to 800 by 32 for VOC, 640 to 800 for COCO)"
    )
    parser.add_argument("--short-sides", type=int, nargs="+", metavar="S", help=text)
    parser.add_argument("--test-short-side", type=int, dest="size", metavar="S", help="(the largest of --short-sides)")
    text = "no image is longer than that (1333/800 of --test-short-side)"
    parser.add_argument("--long-side", type=int, metavar="S", help=text)
    text = "side of the smallest anchor in pixels; four more double it (%(default)s)"
    parser.add_argument("--smallest-anchor", type=int, default=32, metavar="S", help=text)
    text = "regions of an image that the head is trained on (%(default)s)"
    parser.add_argument("--regions", type=int, default=512, metavar="N", help=text)
    text = "proposals of an image that the head sees in evaluation (%(default)s)"
    parser.add_argument("--proposals", type=int, default=1000, metavar="N", help=text)
    text = "channels of the feature pyramid and its heads (%(default)s)"
    parser.add_argument("--fpn-channels", type=int, default=256, metavar="C", help=text)


def run(arguments: argparse.Namespace) -> None:
    world = World.of_environment()
    with world.joined(arguments.device), contextlib.ExitStack() as stack:
        with world.together():
            _check(arguments, world)
            precision.check_evaluator(arguments.evaluator)
            train, val = read_both(arguments)
            _fill_in(arguments, _PRESETS[train.form])
            inputs = stack.enter_context(opened(arguments, world))
            check_encoder(inputs.origin["description"])
            if arguments.model == "mask_rcnn":
                check_masks(train, "--train")
                check_masks(val, "--val")
            else:
                train, val = without_outlines(train), without_outlines(val)
            folder = _work_folder(inputs) if world.is_first else None
        # Not above: ranks that meet an error there exchange it, and would wait for this meanwhile.
        folder = world.share(folder)
        workers = workers_of(arguments.workers, world)
        arguments.workers = usable_cores() if workers is None else workers
        _measure(inputs, train, val, folder)


def _check(arguments, world):
    """Raises `UserError` for a number that is out of range."""
    check_least(arguments, iterations=1, warmup=0, precise_bn=0, long_side=1, smallest_anchor=1)
    check_least(arguments, batch_size=1, regions=1, proposals=1, fpn_channels=1)
    if arguments.size is not None and arguments.size < 1:
        raise UserError(f"--test-short-side: {arguments.size} is below 1", "out-of-range")
    if min(arguments.short_sides or [1]) < 1:
        raise UserError(f"--short-sides: {min(arguments.short_sides)} is below 1", "out-of-range")
    if not 0 < arguments.lr < math.inf:
        raise UserError(f"--lr: {arguments.lr:g} is not above 0", "out-of-range")
    if not 0 <= arguments.weight_decay < math.inf:
        raise UserError(f"--weight-decay: {arguments.weight_decay:g} is below 0", "out-of-range")
    if any(not 0 < share <= 1 for share in arguments.steps or ()):
        text = "--steps: shares of the iterations are in (0, 1], for example --steps 0.75 0.9167"
        raise UserError(text, "out-of-range")
    if arguments.batch_size % world.size:
        text = f"--batch-size: {arguments.batch_size} images do not divide among {world.size} processes"
        raise UserError(text, "batch-does-not-divide")


def _fill_in(arguments, preset):
    """What the command line leaves open."""
    for key, value in preset.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    arguments.size = arguments.size or max(arguments.short_sides)
    arguments.long_side = arguments.long_side or arguments.size * 1333 // 800
    if arguments.precise_bn is None:
        arguments.precise_bn = min(200, arguments.iterations)


def _work_folder(inputs):
    """The folder of checkpoint and picture; None without a folder of results."""
    folder, asked = results_folder(inputs), inputs.arguments
    if folder is None:
        return None
    untrained = "_untrained" if asked.untrained else ""
    work = folder / f"detect_{asked.model}_{asked.body}{untrained}"
    with written(work):
        work.mkdir(exist_ok=True)
    return work


def _measure(inputs, train, val, folder):
    asked, runtime, world, say = inputs.arguments, inputs.runtime, inputs.runtime.world, inputs.say
    for part, annotations in (("train", train), ("val", val)):
        say(f"{part:9} {len(annotations.images):,} images, {annotations.boxes:,} boxes, {annotations.form} format")
        for note in annotations.notes:
            say(f"{'':9} {note}")
    settings = _settings(inputs, len(train.classes))
    schedule = Schedule(
        asked.iterations,
        asked.batch_size,
        asked.lr,
        asked.warmup,
        tuple(asked.steps),
        asked.weight_decay,
        asked.precise_bn,
    )
    images = TrainingImages(train.images, asked.short_sides, asked.long_side, asked.seed, settings.masks)
    batches = Batches(images, asked.batch_size, runtime, asked.workers, asked.seed)
    encoder = copy.deepcopy(inputs.encoder)
    if asked.untrained and asked.freeze != "none":
        fill_statistics(encoder, Transform(settings), batches, FILL_BATCHES)
    weights = copy.deepcopy(encoder.state_dict())
    torch.manual_seed(asked.seed)
    model = build_detector(encoder, settings).to(runtime.device)
    training = Training(model, batches, schedule, runtime)
    facts = check_detector(training.model, weights, asked.freeze)
    kinds = ", ".join(f"{count} {name}" for name, count in facts["norms"].items())
    say(
        f"detector  {asked.model} {asked.body}: {facts['loaded_tensors']} tensors of the encoder, "
        f"{facts['trained_tensors']} trained and {facts['frozen_tensors']} frozen ones; norms: {kinds}"
    )
    protocol = _protocol(asked)
    identity = protocol | {
        "seed": asked.seed,
        "classes": list(train.classes),
        "images": len(train.images),
        "ENCODER": sha256_of_tensors(inputs.encoder.state_dict()),
    }
    if asked.resume:
        with world.together():
            found = folder is not None and training.resume(folder, identity)
        say(f"resumed   at iteration {training.iteration:,}" if found else "resumed   nothing: there is no checkpoint")
    try:
        training.run(say, 60 * asked.checkpoint_minutes, folder, identity)
    except torch.OutOfMemoryError as error:
        # Without `together`: the other ranks wait in a collective, and torchrun ends them.
        raise UserError(
            f"--batch-size: out of memory on the GPU at {asked.batch_size // world.size} images of up to "
            f"{asked.long_side} px on each; give a smaller --batch-size, smaller --short-sides, or more GPUs",
            "out-of-memory",
        ) from error
    training.use_exact_statistics()
    training.save(say, folder, identity)
    found = evaluation.detect(
        training.model, val.images, runtime, max(1, asked.batch_size // world.size), asked.workers
    )
    if world.is_first:
        _publish(inputs, train, val, found, {**protocol, **facts}, folder)


def _settings(inputs, classes):
    asked = inputs.arguments
    return DetectorSettings(
        classes,
        asked.body,
        asked.model == "mask_rcnn",
        asked.freeze,
        inputs.spec.mean,
        inputs.spec.std,
        asked.size,
        asked.long_side,
        asked.smallest_anchor,
        asked.regions,
        asked.proposals,
        asked.fpn_channels,
    )


def _protocol(asked):
    """What defines a result, for its line and for the checkpoint."""
    names = (
        "model", "body", "freeze", "iterations", "batch_size", "lr", "warmup", "steps", "weight_decay", "precise_bn",
        "short_sides", "long_side", "smallest_anchor", "regions", "proposals", "fpn_channels",
    )  # fmt: skip
    values = {name: getattr(asked, name) for name in names}
    values |= {name: list(values[name]) for name in ("steps", "short_sides")}
    if asked.body == "c4":
        del values["fpn_channels"]
    return {**values, "epoch": "last", "features": "finetuned"}


def _publish(inputs, train, val, found, settings, folder):
    asked, classes = inputs.arguments, len(train.classes)
    numbers = precision.coco_ap(val.images, found, classes, "bbox", asked.evaluator)
    if asked.model == "mask_rcnn":
        masks = precision.coco_ap(val.images, found, classes, "segm", asked.evaluator)
        numbers |= {f"{name}_masks": value for name, value in masks.items()}
    if val.form == "voc":
        numbers |= precision.voc07_ap(val.images, found, classes)
    data = {
        "train": " ".join(map(str, asked.train)),
        "val": " ".join(map(str, asked.val)),
        "format": val.form,
        "train_images": len(train.images),
        "val_images": len(val.images),
        "val_boxes": val.boxes,
        "detections": sum(len(one.boxes) for one in found),
        "classes": classes,
        "evaluator": asked.evaluator,
    }
    publish("detect", settings, numbers, inputs, data)
    # After the result, which a disk that refuses must not cost.
    if folder is not None:
        picture = folder / "boxes.png"
        with written(picture):
            evaluation.draw(val.images, found, train.classes, picture)
        inputs.say(f"picture   {picture}")
