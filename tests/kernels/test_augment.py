"""The augmenter's kernels, numba's and Triton's (under its interpreter, or on a GPU), against the reference in fp64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastsiam.config.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from fastsiam.data.augment import augment, host_draws
from fastsiam.data.rng import augment_draws
from fastsiam.kernels import augment_table, augment_triton, augment_views, reference
from fastsiam.kernels.augment import augment_views_op
from fastsiam.kernels.augment_numba import augment_on_cpu
from fastsiam.kernels.augment_triton import augment_on_cuda
from tests.support.processes import run_python

CUDA = torch.cuda.is_available()
KERNELS = {"triton": (augment_on_cuda, "cuda" if CUDA else "cpu"), "numba": (augment_on_cpu, "cpu")}
pytestmark = [pytest.mark.gpu] if CUDA else []

NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
BUSY = ViewSpec(size=16, color="exact", blur=0.6, jitter=0.9, grayscale=0.3)


def make(count, size, seed=0, spec=BUSY):
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    crops[1::3] = crops[1::3] // 128 * 255
    crops[2::3] = crops[2::3, ..., :1]
    return crops, host_draws(augment_draws(spec, seed, 0, np.arange(count), 0))


def run(kernel, crops, drawn, color, dtype=torch.float32, mean=IMAGENET_MEAN, std=IMAGENET_STD, kind="gaussian"):
    function, device = KERNELS[kernel]
    rows = augment_table.view_table(exact=color == "exact", blur_kind=kind, **drawn).to(device)
    scale, bias = reference.scale_and_bias(mean, std)
    return function(crops.to(device), rows, list(scale), list(bias), color == "exact", dtype).cpu()


# Just above the blur's reach; not a multiple of a tile's rows; more elements in a row than in a block of 32.
@pytest.mark.parametrize(
    ("size", "dtype", "kind"),
    [
        (7, torch.float32, "gaussian"),
        (7, torch.float32, "pil"),
        (11, torch.float32, "gaussian"),
        (11, torch.bfloat16, "pil"),
        (11, torch.float16, "gaussian"),
        (12, torch.float32, "pil"),
    ],
    ids=str,
)
@pytest.mark.parametrize("color", ["matrix", "exact"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_views_are_the_references_within_twice_its_fp32_error(kernel, color, dtype, size, kind, monkeypatch):
    monkeypatch.setattr(augment_triton, "BLOCK", 32)
    crops, drawn = make(6, size)
    ours = run(kernel, crops, drawn, color, dtype, kind=kind)
    exact, plain = (
        reference.augment_views_ref(crops, **drawn, color=color, **NORMALISED, dtype=dtype, blur_kind=kind)
        for dtype in (torch.float64, torch.float32)
    )
    assert exact.dtype == torch.float64
    assert ours.dtype == dtype
    assert ours.stride() == plain.stride()
    error, theirs = ((x - exact).abs().amax((1, 2, 3)) for x in (ours.double(), plain.to(dtype).double()))
    ulp = torch.finfo(dtype).eps * exact.abs().amax((1, 2, 3))
    assert (error <= 2 * theirs + ulp).all(), (error, theirs, ulp)


# Triton's interpreter cuts bf16 off where a GPU rounds.
@pytest.mark.parametrize("kernel", list(KERNELS) if CUDA else ["numba"])
def test_bf16_is_fp32_rounded_to_nearest(kernel):
    crops, drawn = make(6, 8)
    full, half = (run(kernel, crops, drawn, "matrix", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(half, full.to(torch.bfloat16))


@pytest.mark.parametrize("kind", reference.BLUR_KINDS)
@pytest.mark.parametrize("color", ["matrix", "exact"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_contrast_is_about_the_mean_of_the_blurred_crop(kernel, color, kind):
    """A crop bright at its border only: reflection without the edge reads the border row once, its neighbours twice."""
    crops = torch.zeros(1, 12, 12, 3, dtype=torch.uint8)
    crops[:, 0], crops[:, :, 1] = 200, 120
    drawn = {
        "flip": torch.zeros(1, dtype=torch.bool),
        "sigma": torch.tensor([2.0]),
        "order": torch.tensor([[1, 0, 2, 3]]),
        "factors": torch.tensor([[1.0, 0.5, 1.0, 0.0]]),
        "grayscale": torch.zeros(1, dtype=torch.bool),
        "solarize": torch.zeros(1, dtype=torch.bool),
    }
    ours = run(kernel, crops, drawn, color, mean=(0.0,) * 3, std=(1.0,) * 3, kind=kind)
    blurred = reference.blur(reference.to_unit(crops, torch.float64), torch.tensor([2.0]).double(), kind)
    grey = reference.luma(blurred).mean()
    torch.testing.assert_close(ours.double(), 0.5 * blurred + 0.5 * grey, atol=1e-6, rtol=0)
    unblurred = reference.luma(reference.to_unit(crops, torch.float64)).mean()
    assert (abs(unblurred - grey) > 1e-3) == (kind == "gaussian")


SIGMAS = (0.1, 0.3, 0.5, 1.2, 1.41, 1.42, 2.0)


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
def test_the_blur_of_the_papers_recipe_is_pillows(kernel):
    """Three levels are the six roundings of Pillow's passes; above sigma 1.41 they hold inside the image only."""
    generator = np.random.default_rng(0)
    crops = generator.integers(0, 256, (len(SIGMAS), 18, 18, 3), np.uint8)
    crops[:, 9:] = crops[:, 9:] // 128 * 255
    nothing = torch.zeros(len(SIGMAS), dtype=torch.bool)
    drawn = {
        "flip": nothing,
        "sigma": torch.tensor(SIGMAS),
        "order": torch.arange(4).repeat(len(SIGMAS), 1),
        "factors": torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(SIGMAS), 1),
        "grayscale": nothing,
        "solarize": nothing,
    }
    pixels = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}

    def levels(kind):
        if kernel == "reference":
            return reference.augment_views_ref(
                torch.from_numpy(crops), **drawn, color="exact", **pixels, dtype=torch.float32, blur_kind=kind
            )
        return run(kernel, torch.from_numpy(crops), drawn, "exact", **pixels, kind=kind)

    blurs = (
        np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(sigma)))
        for sigma, crop in zip(SIGMAS, crops, strict=True)
    )
    pillow = torch.from_numpy(np.stack(list(blurs))).permute(0, 3, 1, 2)
    off = (levels("pil") - pillow).abs()
    small = torch.tensor(SIGMAS) < 2**0.5
    assert off[small].max() < 3.01
    assert off[..., 6:-6, 6:-6].max() < 3.01
    assert off.max() < 20
    assert (levels("gaussian") - pillow).abs()[SIGMAS.index(0.3), :, 6:-6, 6:-6].max() > 25


@pytest.mark.parametrize("kind", reference.BLUR_KINDS)
def test_the_table_holds_the_references_blur(kind):
    _, drawn = make(200, 8)
    rows = augment_table.view_table(exact=False, blur_kind=kind, **drawn).double()
    rows = rows[:, augment_table.BLUR : augment_table.COLOR]
    blurred = drawn["sigma"] > 0
    weights = reference.blur_weights(drawn["sigma"][blurred].double(), kind)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)).double(), atol=1e-14, rtol=0)
    torch.testing.assert_close(weights, weights.flip(1), atol=1e-15, rtol=0)
    torch.testing.assert_close(rows[blurred], weights[:, augment_table.REACH :], atol=1e-7, rtol=0)
    assert not rows[~blurred].any()
    if kind == "pil":
        # The variance of three boxes is sigma^2.
        variance = (weights * torch.arange(-augment_table.REACH, augment_table.REACH + 1).double() ** 2).sum(1)
        torch.testing.assert_close(variance, drawn["sigma"][blurred].double() ** 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_solarize_starts_at_one_half(kernel):
    crops = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 2, 2, 1).repeat(2, 4, 4, 3)
    _, drawn = make(2, 8, spec=replace(BUSY, jitter=0.0, blur=0.0, flip=0.0, grayscale=0.0))
    drawn["solarize"] = torch.tensor([True, False])
    ours = run(kernel, crops, drawn, "matrix", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert ours[0, 1, :2, :2].flatten().tolist() == pytest.approx([0, 127 / 255, 127 / 255, 0], abs=1e-6)
    assert ours[1, 1, :2, :2].flatten().tolist() == pytest.approx([0, 127 / 255, 128 / 255, 1], abs=1e-6)


def test_the_table_holds_the_references_color():
    _, drawn = make(200, 8)
    rows = augment_table.view_table(exact=False, **drawn).double()
    linear, row, column = reference.fold_color(drawn["order"], drawn["factors"].double(), drawn["grayscale"])
    ours = rows[:, augment_table.COLOR :]
    torch.testing.assert_close(ours[:, :9], linear.flatten(1), atol=2e-7, rtol=0)
    torch.testing.assert_close(ours[:, 12:], column, atol=2e-7, rtol=0)
    # The row matters only where a contrast was drawn.
    torch.testing.assert_close(ours[:, 9:12] * ours[:, 12:13], row * column[:, :1], atol=2e-7, rtol=0)


def test_one_view_and_none():
    def views(crops, drawn):
        return augment_views(crops, **drawn, color="matrix", **NORMALISED, dtype=torch.float32)

    crops, drawn = make(1, 8)
    batch, all_drawn = make(4, 8)
    batch[0] = crops[0]
    assert torch.equal(views(crops, drawn)[0], views(batch, all_drawn)[0])
    assert views(crops[:0], {name: draw[:0] for name, draw in drawn.items()}).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("exact", [True, False])
def test_opcheck(exact):
    crops, drawn = make(3, 8)
    rows = augment_table.view_table(exact=exact, **drawn)
    checks = torch.library.opcheck(augment_views_op, (crops, rows, [1.0] * 3, [0.0] * 3, exact, torch.bfloat16))
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_it_is_one_graph_with_the_same_numbers():
    torch._dynamo.reset()
    crops, drawn = make(3, 8)
    rows = augment_table.view_table(exact=False, **drawn)

    def step(crops, rows):
        return 2 * augment_views_op(crops, rows, [1.0] * 3, [0.0] * 3, False, torch.float32)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(crops, rows), step(crops, rows))


def test_crops_may_be_slices_of_a_buffer():
    crops, drawn = make(4, 8)
    wide = torch.zeros(4, 10, 12, 3, dtype=torch.uint8)
    wide[:, 1:9, 2:10] = crops
    ours, plain = (
        augment_views(x, **drawn, color="exact", **NORMALISED, dtype=torch.float32) for x in (wide[:, 1:9, 2:10], crops)
    )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": torch.zeros(2, 8, 8, 3)}, "crops must be uint8"),
        ({"crops": torch.zeros(2, 8, 9, 3, dtype=torch.uint8)}, "crops must be uint8"),
        ({"crops": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "crops must be uint8"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"blur_kind": "box"}, "blur_kind must be pil or gaussian, got 'box'"),
        ({"color": "hsv"}, "color must be matrix or exact, got 'hsv'"),
        ({"crops": torch.zeros(2, 6, 6, 3, dtype=torch.uint8), "sigma": torch.ones(2)}, "13 taps needs crops of more"),
    ],
)
def test_what_it_cannot_do_it_says(change, message):
    crops, drawn = make(2, 8)
    arguments = {"crops": crops, **drawn, "color": "matrix", **NORMALISED, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        augment_views(**{**arguments, **change})


def test_without_jitter_no_pixel_changes():
    crops, _ = make(4, 8)
    plain = replace(BUSY, jitter=0.0, grayscale=0.0, blur=0.0, flip=0.0)
    draws = augment_draws(plain, 0, 0, np.arange(4), 0)
    expected = reference.normalize(reference.to_unit(crops), plain.mean, plain.std, torch.float32)
    torch.testing.assert_close(augment(crops, draws, plain, torch.float32), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_torch_keeps_its_number_of_threads():
    """In a process of its own: numba starts its threads once, with OpenMP's number for all libraries."""
    program = (
        "import torch; torch.set_num_threads(1); from tests.kernels.test_augment import make, run; "
        "run('numba', *make(2, 8), 'matrix'); import sys; sys.exit(torch.get_num_threads() - 1)"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
