"""The sections data and views of a config: what images there are, who reads them, and what a view of one is."""

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
    """Both ends of LOW..HIGH, which may be negative and have a fraction; None for another text."""
    match = re.fullmatch(rf"\s*({_NUMBER})\.\.({_NUMBER})\s*", text)
    return (float(match[1]), float(match[2])) if match else None


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    train: str | None
    """Folder of images (labelled `class/x.jpg`, nested or flat) or tar shards, text list, .beton; null: synthetic."""
    val: str | None = None
    """Labelled images for kNN; null trains without."""
    backend: Literal["auto", "dali", "pil", "ffcv", "resident", "synthetic"] = "auto"
    """Who decodes and crops. auto: ffcv for a .beton, else DALI where installed, else PIL; the choice is printed.
    resident: all images lie decoded in the memory of the compute device."""
    augment: Literal["fastsiam", "dali"] = "fastsiam"
    """dali: DALI's own operators in its own order make the views, with our draws; needs data.backend=dali."""
    store_size: PositiveInt | None = None
    """Side in pixels of the squares that resident stores the images as: 3 * store_size^2 bytes an image; null: chosen
    by the sizes of images and views."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Decoding threads (dali, ffcv) or processes (pil) a rank; null: its share of the cores, 0: none (pil)
    or one (dali, ffcv)."""
    max_bad_fraction: Probability = 0.001
    """A run stops when more than this share of the images could not be decoded; what a scan found does not count. Nor
    does it begin where more is left out of a folder: dead links, empty files, formats without an installed decoder."""
    deep_pixels: str = "scale"
    """Of pixels with more than 8 bits the values that become 0..255. scale: the 0.1 to 99.9 % percentiles of the
    training images, by kind of file (what fills half of its type: its type); type: the range of the type, 0..1 of
    floats; or LOW..HIGH, as -1000..2000."""
    manifest: str | None = None
    """What a scan has found in data.train, if it was written elsewhere than the index cache, where it is looked for."""
    demo_seed: Annotated[int, Field(ge=0)] | None = None
    """Draw the demo images of this seed to FOLDER/train, FOLDER/val where data.train is FOLDER/train and there is no
    FOLDER; null never draws. Another data.train on the command line makes it null, unless it is given there, too."""

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
    """One recipe for all views; what is not written is filled in from the recipe."""

    recipe: Literal[tuple(RECIPES)]
    count: Annotated[int, Field(ge=2)] = 2
    """Views of each image, all from one decode. 2 is the paper's loss; above, its mean over all ordered pairs."""
    size: int | str
    """Side of a view in pixels, or LOW..HIGH (as 128..224): it grows over the first 80 % of the run, from epoch to
    epoch and in at most five sizes; kNN and collapse are measured at HIGH."""
    color: Literal["matrix", "exact"]
    """exact: torchvision's jitter, operation by operation; matrix: the same jitter as one 3x4 matrix a view."""
    crop_scale: Pair
    """Range of the crop's area as a share of the image."""
    flip: Probability
    jitter: Probability
    brightness: Probability
    contrast: Probability
    saturation: Probability
    hue: Annotated[float, Field(ge=0, le=0.5)]
    grayscale: Probability
    blur: Probability
    blur_sigma: Pair
    """Range of the blur's standard deviation in pixels of the view."""
    blur_kind: Literal["pil", "gaussian"]
    """pil: the three boxes of Pillow's GaussianBlur, as the paper's code; gaussian: a sampled Gaussian, as torchvision
    and runs before there was this key. data.augment=dali samples a Gaussian whatever this says."""
    solarize: Probability
    mean: Annotated[tuple[float, float, float], Field(strict=False)]
    std: Annotated[tuple[float, float, float], Field(strict=False)]

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
        if ends is None or min(ends) < 1:
            raise ValueError(
                f"views.size: {shown(given)} is neither a positive number of pixels nor a range such as 128..224"
            )
        low, high = ends
        if low >= high:
            raise ValueError(f"views.size: {given} does not grow; write LOW..HIGH with LOW below HIGH, or one number")
        return f"{low}..{high}"

    @model_validator(mode="after")
    def check_ranges(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"views.crop_scale: {list(self.crop_scale)} is not a range inside (0, 1]")
        low, high = self.blur_sigma
        if not 0 < low <= high <= 2:
            # Thirteen taps cover three standard deviations up to 2.
            raise ValueError(f"views.blur_sigma: {list(self.blur_sigma)} is not a range inside (0, 2]")
        if self.blur and self.sizes[0] < 7:
            raise ValueError(f"views.size: {self.sizes[0]} is below 7, the least that the 13-tap blur can reflect")
        if min(self.std) <= 0:
            raise ValueError(f"views.std: {list(self.std)} must be positive")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides that views have in turn; one for a fixed size."""
        return (self.size,) if isinstance(self.size, int) else sizes_between(*parse_range(self.size))

    @property
    def full_size(self) -> int:
        """The last of them, at which everything is evaluated."""
        return self.sizes[-1]
