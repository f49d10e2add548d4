"""The augmentation of DALI's own operators, rendered inside its graph with our draws: `data.augment=dali`.

For those who know it from other projects, and as the other side of a measurement. What differs from our augmenter: the
colour operations come in one order for every view (saturation and hue as a rotation in YIQ, contrast about mid-grey,
brightness; greyscale is saturation 0), the blur comes after them, is a sampled Gaussian whatever `blur_kind` says, in
DALI's window (2 * ceil(3 sigma) + 1), every operation rounds to 8 bits, and in the outer ring of a crop the resize
mixes in what lies around its box.
"""

from dataclasses import replace

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data.backends.dali import DaliBackend, decode_graph
from fastsiam.data.rng import AugmentDraws
from fastsiam.data.sources.source import ImageSource
from fastsiam.runtime.cores import threads_for

# What the operators take of a view's draws; the last two decide on the host which images go where.
_TYPES = {
    "brightness": types.FLOAT,
    "contrast": types.FLOAT,
    "saturation": types.FLOAT,
    "hue": types.FLOAT,
    "sigma": types.FLOAT,
    "mirror": types.INT32,
    "blurred": types.BOOL,
    "solarized": types.BOOL,
}
_COLOUR = ("brightness", "contrast", "saturation", "hue")


def open_backend(source, groups, batch_size, workers, device, dtype) -> "RecipeBackend":
    return RecipeBackend(source, groups, batch_size, threads_for(workers), device, dtype)


@pipeline_def(enable_conditionals=True)
def view_graph(source, specs: list[ViewSpec], decoder: str, packed: bool, memory: dict[str, int]):
    """[files, indices, boxes of each view, draws of each view] -> [index, shape of the image, views [S, S, 3] of each].

    The views are finished, float32; the other arguments are those of `fastsiam.data.backends.dali.image_graph`.
    """
    names = [name for spec in specs for name in operands(spec)]
    kinds = [types.UINT8, types.INT64, *[types.FLOAT] * len(specs), *[_TYPES[name] for name in names]]
    files, indices, *inputs = fn.external_source(source, num_outputs=len(kinds), dtype=kinds)
    images = decode_graph(files, decoder, packed, memory)
    views, first = [], len(specs)
    for number, spec in enumerate(specs):
        drawn = {name: inputs[first + place] for place, name in enumerate(operands(spec))}
        first += len(drawn)
        views.append(rendered(resized(images, inputs[number], spec.size), drawn, spec))
    return indices, images.shape(device="cpu"), *views


def resized(images, box, size: int):
    """`box`: float [4], top, left, bottom, right in pixels."""
    return fn.resize(
        images, size=(size, size), roi_start=box[:2], roi_end=box[2:], interp_type=types.INTERP_LINEAR, antialias=True
    )


def rendered(view, drawn: dict, spec: ViewSpec):
    """Colour, blur, solarize, flip, normalise; what `spec` never draws has no operator."""
    if spec.jitter or spec.grayscale:
        view = fn.color_twist(view, **{name: drawn[name] for name in _COLOUR})
    if spec.blur:
        view = blurred(view, drawn)
    if spec.solarize:
        view = solarized(view, drawn)
    return fn.crop_mirror_normalize(
        view,
        mirror=drawn["mirror"],
        mean=[255 * mean for mean in spec.mean],
        std=[255 * std for std in spec.std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def blurred(view, drawn: dict):
    """DALI splits the batch by the host's draw, and blurs one part."""
    if drawn["blurred"]:
        view = fn.gaussian_blur(view, sigma=drawn["sigma"])
    return view


def solarized(view, drawn: dict):
    if drawn["solarized"]:
        view = view ^ (types.Constant(255).uint8() * (view >= 128))
    return view


def operands(spec: ViewSpec) -> list[str]:
    """Names of the draws that the operators of a view take."""
    names = ["mirror"]
    if spec.jitter or spec.grayscale:
        names += _COLOUR
    if spec.blur:
        names += ["sigma", "blurred"]
    return names + ["solarized"] * bool(spec.solarize)


def corners(boxes: np.ndarray) -> np.ndarray:
    """Top, left, height, width [..., 4] as float32 top, left, bottom, right."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1).astype(np.float32)


def arguments(drawn: AugmentDraws) -> dict[str, np.ndarray]:
    """The draws of B views as [B] arguments of DALI's operators; hue in degrees."""
    brightness, contrast, saturation, turn = np.ascontiguousarray(drawn.factors.T)
    return {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": np.where(drawn.grayscale, np.float32(0), saturation),
        "hue": np.float32(360) * turn,
        "sigma": drawn.sigma,
        "mirror": drawn.flip.astype(np.int32),
        "blurred": drawn.sigma > 0,
        "solarized": drawn.solarize,
    }


class RecipeBackend(DaliBackend):
    """Delivers finished views [V_g*N, 3, S_g, S_g] a group, channels-last."""

    def __init__(self, source: ImageSource, groups: tuple[ViewGroup, ...], batch_size, threads, device, dtype):
        super().__init__(source, tuple(group.spec.size for group in groups), batch_size, threads, device)
        self._groups, self._dtype = groups, dtype
        self.description += ", augmented by DALI"

    def resize(self, sizes):
        # The sizes are constants of the graph.
        self.close()
        super().resize(sizes)

    def _graph(self, memory, options):
        specs = [
            replace(spec, size=size)
            for (count, spec), size in zip(self._groups, self._sizes, strict=True)
            for _ in range(count)
        ]
        return view_graph(self._next_inputs, specs, self._decoder, self._packed, memory, **options)

    def _inputs(self, request):
        batch_size = len(request.indices)
        boxes = [view for of_group in request.boxes for view in corners(of_group)]
        drawn = [
            arguments(of_group)[name][first : first + batch_size]
            for group, of_group in zip(self._groups, request.drawn, strict=True)
            for first in range(0, group.count * batch_size, batch_size)
            for name in operands(group.spec)
        ]
        return *boxes, *drawn

    def _deliver(self, request, outputs):
        shapes, *views = outputs
        self._check_sizes(request, np.array(shapes.as_tensor())[:, :2])
        finished, self._cropped = self._lane(lambda: self._own(views))
        return finished

    def _own(self, views):
        """Returns the graph's views as tensors of ours, one a group."""
        rest = iter(views)
        joined = [torch.cat([torch.from_dlpack(next(rest).as_tensor()) for _ in range(n)]) for n, _ in self._groups]
        return [group.to(self._device).permute(0, 3, 1, 2).to(self._dtype) for group in joined]
