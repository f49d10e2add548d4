"""Views of an image: numbers of their augmentation, recipes of the papers with their sources, sizes by epoch."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

# Channel statistics of ImageNet's training images in RGB, the field's convention (torchvision's presets).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ViewSpec:
    """Makes one view of an image: random resized crop, flip, blur, colour, clamp, solarize, normalise, in that order.

    Probabilities in [0, 1]; `brightness`, `contrast`, `saturation` draw a factor from [1 - x, 1 + x] and `hue` a
    turn from [-x, x], as torchvision's ColorJitter does; `blur_sigma` is in pixels of the view, and `blur_kind` one of
    `kernels.reference.BLUR_KINDS`.
    """

    size: int
    color: str
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kind: str = "gaussian"
    solarize: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def numbers(self) -> dict:
        """Returns everything but `size` and `color`, which a config states itself."""
        return {key: value for key, value in asdict(self).items() if key not in ("size", "color")}


class ViewGroup(NamedTuple):
    """Views of one kind: so many of each image, all by the same spec."""

    count: int
    spec: ViewSpec


# Fields that views had not always, with what views did before: files and checkpoints of those runs do not name them.
ADDED = {"blur_kind": "gaussian"}

_SIMSIAM = ViewSpec(size=224, color="exact", blur_kind="pil")
_SIMSIAM_CIFAR10 = ViewSpec(size=32, color="exact", blur=0.0, blur_kind="pil", mean=CIFAR10_MEAN, std=CIFAR10_STD)
# BYOL's code (deepmind-research, byol/utils/augmentations.py): crops of 8 to 100 %, a Gaussian of 23 px. It clips after
# each colour operation and again after solarizing; in between nothing leaves [0, 1], so one clamp before solarizing is
# the same.
_BYOL = ViewSpec(size=224, color="exact", crop_scale=(0.08, 1.0), saturation=0.2)
_BYOL_CIFAR10 = replace(_BYOL, size=32, blur=0.0, mean=CIFAR10_MEAN, std=CIFAR10_STD)
# SimCLR's code (data_util.py), which subtracts no mean: values in [0, 1] go into the network.
_SIMCLR = ViewSpec(
    size=224, color="exact", crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2,
    mean=(0.0,) * 3, std=(1.0,) * 3,
)  # fmt: skip
# SwAV's code (src/multicropdataset.py): SimCLR's colours, Pillow's blur. Its std of red is 0.228, in evaluation too.
_SWAV = replace(_SIMCLR, crop_scale=(0.14, 1.0), blur_kind="pil", mean=IMAGENET_MEAN, std=(0.228, 0.224, 0.225))

RECIPES = {
    # SimSiam, section 4 "Baseline settings" and appendix A: MoCo v2's augmentation, whose code blurs with Pillow.
    "simsiam": _SIMSIAM,
    # SimSiam, appendix D: as for ImageNet, without blur.
    "simsiam_cifar10": _SIMSIAM_CIFAR10,
    # The first and the second of two views.
    "byol_1": replace(_BYOL, blur=1.0),
    "byol_2": replace(_BYOL, blur=0.1, solarize=0.2),
    # solo-learn's for CIFAR-10 (scripts/pretrain/cifar/augmentations/asymmetric.yaml); BYOL's authors have none.
    "byol_cifar10_1": replace(_BYOL_CIFAR10, solarize=0.0),
    "byol_cifar10_2": replace(_BYOL_CIFAR10, solarize=0.2),
    "simclr": _SIMCLR,
    # SimCLR's command for CIFAR-10 (README): half the strength, no blur.
    "simclr_cifar10": replace(_SIMCLR, size=32, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0),
    # MoCo v2, whose augmentation is SimSiam's.
    "moco": _SIMSIAM,
    # MoCo's demo for CIFAR-10 (moco_cifar10_demo.ipynb): torchvision's crops of 8 to 100 %, no blur, another std.
    "moco_cifar10": replace(_SIMSIAM_CIFAR10, crop_scale=(0.08, 1.0), std=(0.2023, 0.1994, 0.2010)),
    # The two large crops and the six small ones of multi-crop.
    "swav": _SWAV,
    "swav_small": replace(_SWAV, size=96, crop_scale=(0.05, 0.14)),
    # The demo images have zero-mean colour around mid-grey.
    "demo": ViewSpec(size=32, color="matrix", blur=0.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
}


# Share of a run by which its views have their full size. The ResNet-50 configs of ffcv-imagenet come to theirs after
# 75 % (of 16 epochs) to 81 % (of 88), and let the sizes before it follow a line.
RAMP = 0.8
# Each size is one more graph for torch.compile, which gives up at 8 (torch._dynamo.config.recompile_limit).
MOST_SIZES = 5
_RANGE = re.compile(r"(\d+)\s*\.\.\s*(\d+)")


def spec_of(section) -> ViewSpec:
    """Returns the spec of one group in a config, at its full size."""
    numbers = {field.name: getattr(section, field.name) for field in fields(ViewSpec) if field.name != "size"}
    return ViewSpec(size=section.full_size, **numbers)


def specs_of_run(groups: Sequence[ViewGroup], stages: Sequence[tuple[int, ...]]) -> tuple[ViewSpec, ...]:
    """Returns the spec of every view at every stage of a run; checkpoints are compared by them."""
    return tuple(
        replace(group.spec, size=size)
        for sizes in stages
        for group, size in zip(groups, sizes, strict=True)
        for _ in range(group.count)
    )


def described(specs: tuple[ViewSpec, ...]) -> str:
    """Returns specs as text that is the same for the same views in each version; its hash is in every checkpoint.

    A field that was added later is named only where it changes the views.
    """
    return repr(tuple(_Described(spec) for spec in specs))


class _Described:
    def __init__(self, spec: ViewSpec):
        hidden = {name for name, before in ADDED.items() if getattr(spec, name) == before}
        hidden |= set() if spec.blur else {"blur_kind"}
        self._values = {key: value for key, value in asdict(spec).items() if key not in hidden}

    def __repr__(self):
        return f"ViewSpec({', '.join(f'{key}={value!r}' for key, value in self._values.items())})"


def parse_range(text: str) -> tuple[int, int] | None:
    """Returns both ends of `LOW..HIGH`, or None for another text."""
    match = _RANGE.fullmatch(text.strip())
    return (int(match[1]), int(match[2])) if match else None


def sizes_between(low: int, high: int) -> tuple[int, ...]:
    """Returns the sides in pixels that views of `low..high` have in turn, both ends among them.

    Between the ends lie multiples of 32, or of 8 where `high` is at most 64; of twice, four times, ... as much where
    there would be more than `MOST_SIZES` sizes in all.
    """
    step = 8 if high <= 64 else 32
    while len(sizes := _with_multiples(low, high, step)) > MOST_SIZES:
        step *= 2
    return sizes


def stages_of(sizes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Returns the sides of all groups at each stage of a run, from the sides that each group has in turn.

    There are as many stages as the group with the most sizes has; at the last one every group has its full size.
    """
    last = max(map(len, sizes)) - 1
    return tuple(
        tuple(of_group[stage * (len(of_group) - 1) // max(last, 1)] for of_group in sizes) for stage in range(last + 1)
    )


def default_starts(num_stages: int) -> tuple[float, ...]:
    """Returns the shares of a run at which its stages begin, the first one left out: equal parts of `RAMP`."""
    return tuple(RAMP * (stage / (num_stages - 1)) for stage in range(1, num_stages))


def sizes_at(
    stages: tuple[tuple[int, ...], ...], epoch: int, epoch_progress: float, starts: tuple[float, ...] | None = None
) -> tuple[int, ...]:
    """Returns the sides of the groups' views in epoch number `epoch`, which begins at `epoch_progress` of the run.

    `starts`: shares of the run, measured from its first to its last epoch, at which the second, third, ... stage
    begins; None for those of `default_starts`. Where epochs are alike, the last one has the full size, however few
    there are. Epochs are taken to be as long as those before. A stage lasts whole epochs, and what it depends on stands
    in every checkpoint.
    """
    if epoch == 0:
        return stages[0]
    before_the_last = 1 - epoch_progress / epoch
    begun = [epoch_progress >= start * before_the_last for start in starts or default_starts(len(stages))]
    return stages[sum(begun)]


def sizes_by(
    stages: tuple[tuple[int, ...], ...], progress: float, starts: tuple[float, ...] | None = None
) -> tuple[int, ...]:
    """Returns the sides of the groups' views after `progress` of the run; `starts`: shares of it, as for `sizes_at`."""
    return stages[sum(progress >= start for start in starts or default_starts(len(stages)))]


def _with_multiples(low, high, step):
    return (low, *range(step * (low // step + 1), high, step), high)
