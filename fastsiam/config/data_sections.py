"""Sections data and views of a config: the images, the backend that reads them, and the views made of them."""

import os
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fastsiam.config.views import ADDED, RECIPES, parse_range, sizes_between
from fastsiam.config.yaml_file import shown
from fastsiam.errors import UserError

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Pair = Annotated[tuple[float, float], Field(strict=False)]


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def parse_span(text: str) -> tuple[float, float] | None:
    """Returns both ends of LOW..HIGH, which may be negative and have a fraction; None for another text."""
    match = re.fullmatch(rf"\s*({_NUMBER})\.\.({_NUMBER})\s*", text)
    return (float(match[1]), float(match[2])) if match else None


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    train: str | None
    """Training images: a folder of images (labelled `class/x.jpg`, nested or flat) or of tar shards, a text list, or a
    .beton; null for data.backend=synthetic."""
    val: str | None = None
    """Labelled images for kNN; null: no kNN."""
    backend: Literal["auto", "dali", "pil", "ffcv", "resident", "synthetic"] = "auto"
    """Library that decodes and crops. auto: ffcv for a .beton, else DALI where installed, else PIL; the choice is
    printed. resident: all images lie decoded in the memory of the device. synthetic: random images, to measure
    steps."""
    augment: Literal["fastsiam", "dali"] = "fastsiam"
    """Library that makes the views. dali: DALI's operators in DALI's order, with our draws; needs data.backend=dali."""
    store_size: PositiveInt | None = None
    """Side in pixels of the squares that data.backend=resident stores, 3 * store_size^2 bytes an image; null: chosen by
    the sizes of images and views."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding threads (dali, ffcv) or processes (pil) of a rank; null: its share of the cores; 0: one thread (dali,
    ffcv) or no process (pil)."""
    max_bad_fraction: Probability = 0.001
    """Share of the images that may fail to decode before a run stops; images that a scan found do not count. It is also
    the share of a folder that may be excluded: dead links, empty files, formats without a decoder."""
    deep_pixels: str = "scale"
    """Values that become 0..255 where pixels have more than 8 bits. scale: the 0.1 to 99.9 % percentiles of the
    training images of each kind of file, or its type's range where they fill half of it; type: the range of the type,
    0..1 of floats; or LOW..HIGH, for example -1000..2000."""
    manifest: str | None = None
    """Manifest that `fastsiam prepare scan --out` has written; null: the one in the index cache, if there is one."""
    demo_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the demo images, drawn to FOLDER/train and FOLDER/val where data.train is FOLDER/train and FOLDER does
    not exist; null: never. Another data.train on the command line makes it null, unless it is set there as well."""

    @field_validator("train", "val", "manifest")
    @classmethod
    def home_expanded(cls, path):
        return path if path is None else os.path.expanduser(path)

    @field_validator("deep_pixels")
    @classmethod
    def scale_type_or_a_range(cls, given):
        ends = parse_span(given)
        if given not in ("scale", "type") and (ends is None or not ends[0] < ends[1]):
            raise UserError(
                f"data.deep_pixels: {shown(given)} is not scale, type or a range LOW..HIGH such as -1000..2000",
                "bad-deep-pixels",
            )
        return given

    @model_validator(mode="after")
    def what_there_is_to_read(self):
        if self.train is None and self.backend != "synthetic":
            raise UserError(
                "data.train: null is for data.backend=synthetic; give a folder or a list of files", "no-data"
            )
        if self.augment == "dali" and self.backend != "dali":
            raise UserError(
                f"data.augment: dali needs data.backend=dali, but it is {self.backend}; set that, or "
                "data.augment=fastsiam",
                "augment-without-dali",
            )
        return self

    @model_validator(mode="after")
    def ffcv_reads_betons(self):
        for key, location in (("data.train", self.train), ("data.val", self.val)):
            if location is None or self.backend in ("auto", "synthetic"):
                continue
            if self.backend == "ffcv" and not location.endswith(".beton"):
                raise UserError(
                    f"{key}: data.backend=ffcv reads .beton files, and {shown(location)} is not one; write one with "
                    f"fastsiam prepare ffcv {location} OUT.beton, and set {key}=OUT.beton",
                    "not-a-beton",
                )
            if self.backend != "ffcv" and location.endswith(".beton"):
                raise UserError(
                    f"{key}: data.backend={self.backend} cannot read {shown(location)}; set data.backend=ffcv",
                    "beton-without-ffcv",
                )
        return self


class ViewsConfig(Section):
    """One group of views, all by one recipe, which fills in what is not written."""

    recipe: Literal[tuple(RECIPES)]
    """Augmentation whose numbers fill in the keys that are not written; config/views.py names the sources."""
    count: PositiveInt = 2
    """Views of each image, all from one decode. 2 is the paper's loss; above, SimSiam's is the mean over all ordered
    pairs, or that of method.target_views."""
    size: int | str
    """Side of a view in pixels, or LOW..HIGH (as 128..224): it grows over the first 80 % of the run, or as
    train.views_grow_at says, in at most five sizes; kNN and collapse are measured at HIGH."""
    color: Literal["matrix", "exact"]
    """Way to compute colour jitter. exact: torchvision's, operation by operation; matrix: as one 3x4 matrix a view."""
    crop_scale: Pair
    """Range of the crop's area as a share of the image."""
    flip: Probability
    """Probability of a horizontal flip."""
    jitter: Probability
    """Probability of colour jitter."""
    brightness: Probability
    """Brightness is multiplied by a factor from [1 - brightness, 1 + brightness]."""
    contrast: Probability
    """Contrast is multiplied by a factor from [1 - contrast, 1 + contrast]."""
    saturation: Probability
    """Saturation is multiplied by a factor from [1 - saturation, 1 + saturation]."""
    hue: Annotated[float, Field(ge=0, le=0.5)]
    """Hue is turned by a share of the circle from [-hue, hue]."""
    grayscale: Probability
    """Probability of a grey view."""
    blur: Probability
    """Probability of a blur."""
    blur_sigma: Pair
    """Range of the blur's standard deviation in pixels of the view."""
    blur_kind: Literal["pil", "gaussian"]
    """Blur kernel. pil: the three boxes of Pillow's GaussianBlur, as in the paper's code; gaussian: a sampled Gaussian,
    as in torchvision and in runs older than this key. data.augment=dali always samples a Gaussian."""
    solarize: Probability
    """Probability that values above one half are inverted."""
    mean: Annotated[tuple[float, float, float], Field(strict=False)]
    """Mean of the red, green and blue channel in [0, 1], which normalisation subtracts."""
    std: Annotated[tuple[float, float, float], Field(strict=False)]
    """Standard deviation of the channels, by which normalisation divides."""

    @model_validator(mode="before")
    @classmethod
    def fill_from_recipe(cls, given):
        name = given.get("recipe") if isinstance(given, dict) else None
        if isinstance(name, str) and name in RECIPES:
            recipe = RECIPES[name].numbers()
            missing = recipe.keys() - given.keys()
            # Every number but those added since: a run's own config, which says what it did.
            return {**recipe, **(ADDED if missing <= ADDED.keys() else {}), **given}
        return given

    @field_validator("size", mode="before")
    @classmethod
    def one_size_or_a_range(cls, given):
        if type(given) is int and given > 0:
            return given
        ends = parse_range(given) if isinstance(given, str) else None
        if ends is None or not 1 <= ends[0] < ends[1]:
            raise UserError(
                f"views.size: {shown(given)} is neither a positive number of pixels nor a range LOW..HIGH with LOW "
                "below HIGH, such as 128..224",
                "bad-view-size",
            )
        return "{}..{}".format(*ends)

    @model_validator(mode="after")
    def check_ranges(self):
        # Thirteen taps of the blur cover three standard deviations up to 2.
        for key, (low, high), most in (("crop_scale", self.crop_scale, 1), ("blur_sigma", self.blur_sigma, 2)):
            if not 0 < low <= high <= most:
                raise UserError(f"views.{key}: [{low}, {high}] is not a range inside (0, {most}]", "out-of-range")
        if self.blur and self.sizes[0] < 7:
            text = f"views.size: {self.sizes[0]} is below 7, the least that the 13-tap blur can reflect"
            raise UserError(text, "too-small-to-blur")
        if min(self.std) <= 0:
            raise UserError(f"views.std: {list(self.std)} must be positive", "out-of-range")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels that the views have in turn; one for a fixed size."""
        return (self.size,) if isinstance(self.size, int) else sizes_between(*parse_range(self.size))

    @property
    def full_size(self) -> int:
        """Last of `sizes`; kNN and collapse are measured at that of the first group."""
        return self.sizes[-1]
