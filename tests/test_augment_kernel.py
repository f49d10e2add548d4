"""The augmenter's kernels, numba's and Triton's (under its interpreter, or on a GPU), against the reference in fp64."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsiam.data.augment import augment, host_draws
from fastsiam.data.draws import augment_draws
from fastsiam.data.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from fastsiam.kernels import augment_triton, augment_views, reference, table
from fastsiam.kernels.augment import augment_views_op
from fastsiam.kernels.augment_numba import augment_on_cpu
from fastsiam.kernels.augment_triton import augment_on_cuda
from tests.conftest import run_python

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


def run(kernel, crops, drawn, color, dtype=torch.float32, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    function, device = KERNELS[kernel]
    rows = table.view_table(exact=color == "exact", **drawn).to(device)
    scale, bias = reference.scale_and_bias(mean, std)
    return function(crops.to(device), rows, list(scale), list(bias), color == "exact", dtype).cpu()


# Just above the blur's reach; not a multiple of a tile's rows; more elements in a row than in a block of 32.
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(7, torch.float32), (13, torch.float32), (13, torch.bfloat16), (13, torch.float16), (16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("color", ["matrix", "exact"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_views_are_the_references_within_twice_its_fp32_error(kernel, color, dtype, size, monkeypatch):
    monkeypatch.setattr(augment_triton, "BLOCK", 32)
    crops, drawn = make(6, size)
    ours = run(kernel, crops, drawn, color, dtype)
    exact = reference.augment_views_ref(crops, **drawn, color=color, **NORMALISED, dtype=torch.float64)
    plain = reference.augment_views_ref(crops, **drawn, color=color, **NORMALISED, dtype=torch.float32)
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


@pytest.mark.parametrize("color", ["matrix", "exact"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_contrast_is_about_the_mean_of_the_blurred_crop(kernel, color):
    """A crop bright at its border only: reflection reads the border row once, its neighbours twice."""
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
    ours = run(kernel, crops, drawn, color, mean=(0.0,) * 3, std=(1.0,) * 3)
    blurred = reference.gaussian_blur(reference.to_unit(crops, torch.float64), torch.tensor([2.0]).double())
    grey = sum(weight * channel.mean() for weight, channel in zip(reference.LUMA, blurred[0], strict=True))
    torch.testing.assert_close(ours.double(), 0.5 * blurred + 0.5 * grey, atol=1e-6, rtol=0)
    unblurred = reference.to_unit(crops, torch.float64).mean()
    assert abs(unblurred - grey) > 1e-3


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
    rows = table.view_table(exact=False, **drawn).double()
    linear, row, column = reference.fold_color(drawn["order"], drawn["factors"].double(), drawn["grayscale"])
    ours = rows[:, table.COLOR :]
    torch.testing.assert_close(ours[:, :9], linear.flatten(1), atol=2e-7, rtol=0)
    torch.testing.assert_close(ours[:, 12:], column, atol=2e-7, rtol=0)
    # The row matters only where a contrast was drawn.
    torch.testing.assert_close(ours[:, 9:12] * ours[:, 12:13], row * column[:, :1], atol=2e-7, rtol=0)


def test_one_view_and_none():
    crops, drawn = make(1, 8)
    alone = augment_views(crops, **drawn, color="matrix", **NORMALISED, dtype=torch.float32)
    batch, all_drawn = make(4, 8)
    batch[0] = crops[0]
    assert torch.equal(
        alone[0], augment_views(batch, **all_drawn, color="matrix", **NORMALISED, dtype=torch.float32)[0]
    )
    nothing = {name: draw[:0] for name, draw in drawn.items()}
    assert augment_views(crops[:0], **nothing, color="matrix", **NORMALISED, dtype=torch.float32).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("exact", [True, False])
def test_opcheck(exact):
    crops, drawn = make(3, 8)
    rows = table.view_table(exact=exact, **drawn)
    checks = torch.library.opcheck(augment_views_op, (crops, rows, [1.0] * 3, [0.0] * 3, exact, torch.bfloat16))
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_it_is_one_graph_with_the_same_numbers():
    torch._dynamo.reset()
    crops, drawn = make(3, 8)
    rows = table.view_table(exact=False, **drawn)

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
        ({"color": "hsv"}, "color must be matrix or exact, got 'hsv'"),
        ({"crops": torch.zeros(2, 6, 6, 3, dtype=torch.uint8), "sigma": torch.ones(2)}, "13 taps needs crops of more"),
    ],
)
def test_what_it_cannot_do_it_says(change, message):
    crops, drawn = make(2, 8)
    arguments = {"crops": crops, **drawn, "color": "matrix", **NORMALISED, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        augment_views(**{**arguments, **change})


def test_without_jitter_the_drawn_factors_do_nothing():
    crops, _ = make(4, 8)
    draws = augment_draws(replace(BUSY, jitter=1.0, grayscale=0.0), 0, 0, np.arange(4), 0)
    off = replace(draws, jitter=np.zeros(4, bool))
    neutral = replace(off, factors=np.tile(np.float32([1, 1, 1, 0]), (4, 1)))
    assert torch.equal(augment(crops, off, BUSY, torch.float32), augment(crops, neutral, BUSY, torch.float32))


def test_the_reference_has_the_same_signature():
    assert inspect.signature(augment_views) == inspect.signature(reference.augment_views_ref)


def test_torch_keeps_its_number_of_threads():
    """In a process of its own: numba starts its threads once, with OpenMP's number for all libraries."""
    program = (
        "import torch; torch.set_num_threads(1); from tests.test_augment_kernel import make, run; "
        "run('numba', *make(2, 8), 'matrix'); import sys; sys.exit(torch.get_num_threads() - 1)"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
