"""What a view is: the numbers of its augmentation, and the recipes of the papers, each citing its source."""

from dataclasses import asdict, dataclass, fields

# Channel statistics of ImageNet's training images in RGB, the field's convention (torchvision's presets).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class ViewSpec:
    """One view of an image: random resized crop, flip, blur, colour, clamp, solarize, normalise, in that order.

    Probabilities in [0, 1]; `brightness`, `contrast`, `saturation` draw a factor from [1 - x, 1 + x] and `hue` a
    turn from [-x, x], as torchvision's ColorJitter does; `blur_sigma` is in pixels of the view.
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
    solarize: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def numbers(self) -> dict:
        """Everything but `size` and `color`, which a config states itself."""
        return {key: value for key, value in asdict(self).items() if key not in ("size", "color")}


RECIPES = {
    # SimSiam, section 4 "Baseline settings" and appendix A: MoCo v2's augmentation.
    "simsiam": ViewSpec(size=224, color="exact"),
    # SimSiam, appendix D: as for ImageNet, without blur.
    "simsiam_cifar10": ViewSpec(size=32, color="exact", blur=0.0, mean=CIFAR10_MEAN, std=CIFAR10_STD),
    # The demo images have zero-mean colour around mid-grey.
    "demo": ViewSpec(size=32, color="matrix", blur=0.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
}


def view_specs(views, num_views: int = 2) -> tuple[ViewSpec, ...]:
    """The specs that a config's `views` section asks for, one per view."""
    return (ViewSpec(**{field.name: getattr(views, field.name) for field in fields(ViewSpec)}),) * num_views
