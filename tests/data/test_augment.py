"""The augmenter against torchvision's functional transforms, image by image and operation by operation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as TF2

from fastsiam.config.views import ViewSpec
from fastsiam.data.augment import augment
from fastsiam.data.rng import NO_JITTER, AugmentDraws, augment_draws
from fastsiam.kernels import reference
from fastsiam.kernels.reference import normalize, to_unit
from tests.support.loaders import jittered

# Without a normalisation the views are the images in [0, 1] that torchvision gives.
EXACT = ViewSpec(size=16, color="exact", solarize=0.3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
MATRIX = replace(EXACT, color="matrix")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# The FCC's RGB -> YIQ of 1953, to four digits.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)


def make_crops(count=24, size=16, seed=0):
    """uint8 crops: noise, noise of pure colours (ties of channels, grey pixels), grey noise, smooth gradients."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (count, size, size, 3), np.uint8)
    noise[1::4] = 255 * (noise[1::4] > 127)
    noise[2::4] = noise[2::4, ..., :1]
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    noise[3::4, ..., 0], noise[3::4, ..., 1] = ramp[:, None], ramp[None, :]
    return torch.from_numpy(noise)


def untouched(count):
    """Draws that ask for nothing."""
    return AugmentDraws(
        flip=np.zeros(count, bool),
        factors=np.tile(np.float32(NO_JITTER), (count, 1)),
        order=np.tile(np.arange(4), (count, 1)),
        grayscale=np.zeros(count, bool),
        sigma=np.zeros(count, np.float32),
        solarize=np.zeros(count, bool),
    )


def all_jittered(count, seed=0, **ranges):
    """Draws of the colour jitter alone, on every image."""
    drawn = augment_draws(replace(EXACT, jitter=1.0, **ranges), seed, 0, np.arange(count), 0)
    return replace(untouched(count), factors=drawn.factors, order=drawn.order)


def color_matrix(factors, order=(0, 1, 2, 3), mean=(0.5, 0.5, 0.5), grayscale=False):
    """The linear part and the offset of one view's colour, in fp64."""
    linear, offset = reference.color_matrix(
        torch.tensor([mean], dtype=torch.float64),
        torch.tensor([order]),
        torch.tensor([factors], dtype=torch.float64),
        torch.tensor([grayscale]),
    )
    return linear[0], offset[0]


def torchvision_jitter(image, factors, order, functional):
    names = ("brightness", "contrast", "saturation", "hue")
    for operation in order:
        image = getattr(functional, f"adjust_{names[operation]}")(image, float(factors[operation]))
    return image


def torchvision_view(crop, draws, row, functional=TF, late_blur=False, early_solarize=False):
    """One view by torchvision; the two switches move an operation to another place."""

    def blur(image):
        sigma = float(draws.sigma[row])
        return functional.gaussian_blur(image, 13, sigma) if sigma else image

    def solarize(image):
        return functional.solarize(image, 0.5) if draws.solarize[row] else image

    image = crop.permute(2, 0, 1).float() / 255
    if draws.flip[row]:
        image = functional.hflip(image)
    image = image if late_blur else blur(image)
    image = solarize(image) if early_solarize else image
    if jittered(draws)[row]:
        image = torchvision_jitter(image, draws.factors[row], draws.order[row], functional)
    if draws.grayscale[row]:
        image = functional.rgb_to_grayscale(image, 3)
    image = blur(image) if late_blur else image
    return image if early_solarize else solarize(image)


@pytest.mark.parametrize("functional", [TF, TF2], ids=["v1", "v2"])
@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_each_exact_operation_is_torchvisions(operation, functional):
    crops, draws = make_crops(), all_jittered(24)
    only = np.where(np.arange(4) == operation, draws.factors, NO_JITTER).astype(np.float32)
    ours = augment(crops, replace(draws, factors=only), EXACT, torch.float32)
    for row, crop in enumerate(crops):
        theirs = torchvision_jitter(crop.permute(2, 0, 1) / 255, only[row], [operation], functional)
        torch.testing.assert_close(ours[row], theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("functional", [TF, TF2], ids=["v1", "v2"])
def test_exact_color_in_its_drawn_order_is_torchvisions(functional):
    crops, draws = make_crops(96), all_jittered(96)
    factors = np.where(np.arange(96)[:, None] % 7 > 0, draws.factors, np.float32(NO_JITTER))
    draws = replace(draws, grayscale=np.arange(96) % 5 == 0, factors=factors)
    assert len({tuple(order) for order in draws.order}) > 20
    ours = augment(crops, draws, EXACT, torch.float32)
    theirs = torch.stack([torchvision_view(crop, draws, row, functional) for row, crop in enumerate(crops)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_matrix_color_is_exact_color_where_nothing_clamps_and_the_hue_stays():
    crops, draws = 98 + make_crops(48) // 6, all_jittered(48, hue=0.0)
    draws = replace(draws, grayscale=np.arange(48) % 5 == 0)
    exact, matrix = (augment(crops, draws, spec, torch.float32) for spec in (EXACT, MATRIX))
    assert exact.min() > 0
    assert exact.max() < 1
    torch.testing.assert_close(matrix, exact, atol=2e-6, rtol=0)


def test_matrix_color_clamps_once_at_the_end():
    draws = replace(untouched(1), factors=np.array([[1.4, 1, 0.6, 0]], np.float32))
    pixel = torch.tensor([250.0, 200.0, 10.0]) / 255
    grey = 0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
    expected = (1.4 * (0.6 * pixel + 0.4 * grey)).clamp(0, 1)
    ours = augment((pixel * 255).byte().expand(1, 8, 8, 3), draws, MATRIX, torch.float32)
    assert ours.max() == 1
    torch.testing.assert_close(ours, expected.view(1, 3, 1, 1).expand(1, 3, 8, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grayscale", [False, True])
def test_color_matrix_is_the_chain_of_its_operations(grayscale):
    generator = torch.Generator().manual_seed(0)
    luma = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)
    for number in range(24):
        factors, image = torch.rand(4, generator=generator).double(), torch.rand(3, 40, generator=generator).double()
        order = torch.randperm(4, generator=generator).tolist()
        expected = image
        for operation in order:
            factor = factors[operation]
            if operation == BRIGHTNESS:
                expected = factor * expected
            elif operation == CONTRAST:
                expected = factor * expected + (1 - factor) * (luma @ expected).mean()
            elif operation == SATURATION:
                expected = factor * expected + (1 - factor) * (luma @ expected)
            else:
                expected = color_matrix((1, 1, 1, factor))[0] @ expected
        expected = (luma @ expected).expand(3, -1) if grayscale else expected
        linear, offset = color_matrix(factors.tolist(), order, image.mean(1).tolist(), grayscale)
        torch.testing.assert_close(linear @ image + offset[:, None], expected, atol=1e-12, rtol=0, msg=str(number))


@pytest.mark.parametrize("turn", [-0.1, 0.03, 0.1, 1 / 3, 0.5])
def test_hue_matrix_turns_the_chroma_of_yiq_and_keeps_grey_and_luma(turn):
    linear, offset = color_matrix((1, 1, 1, turn))
    assert (offset == 0).all()
    torch.testing.assert_close(linear.sum(1), torch.ones_like(offset), atol=1e-12, rtol=0)
    colors = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).double()
    before, after = YIQ @ colors, YIQ @ linear @ colors
    torch.testing.assert_close(after[0], before[0], atol=1e-12, rtol=0)
    turned = torch.complex(before[1], before[2]) * np.exp(-2j * np.pi * turn)
    torch.testing.assert_close(torch.complex(after[1], after[2]), turned, atol=1e-12, rtol=0)


@pytest.mark.parametrize("turn", [-0.1, -0.02, 0.02, 0.05, 0.1])
def test_hue_matrix_turns_the_way_of_hsv(turn):
    colors = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1)).double() * 0.4 + 0.3
    by_hsv = TF.adjust_hue(colors, turn) - colors
    linear, _ = color_matrix((1, 1, 1, turn))
    by_matrix = (linear @ colors.flatten(1)).view_as(colors) - colors
    assert ((by_hsv * by_matrix).sum(0) > 0).double().mean() > 0.97
    # Measured: 0.67 to 0.75.
    assert torch.nn.functional.cosine_similarity(by_hsv, by_matrix, dim=0).mean() > 0.6


def test_solarize_inverts_from_one_half_up():
    crops = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 2, 2, 1).repeat(2, 4, 4, 3)
    ours = augment(crops, replace(untouched(2), solarize=np.array([True, False])), EXACT, torch.float32)
    unit = crops.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(ours[0], TF.solarize(unit[0], 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[1], unit[1], atol=1e-6, rtol=0)
    assert ours[0, 0, :2, :2].flatten().tolist() == pytest.approx([0, 127 / 255, 127 / 255, 0])


@pytest.mark.parametrize("spec", [EXACT, MATRIX], ids=lambda spec: spec.color)
def test_solarize_sees_the_clamped_color(spec):
    factors = np.array([[1.4, 1, 1, 0]], np.float32)
    draws = replace(untouched(1), factors=factors, solarize=np.ones(1, bool))
    ours = augment(torch.full((1, 8, 8, 3), 200, dtype=torch.uint8), draws, spec, torch.float32)
    assert (ours == 0).all()


def test_views_are_normalised_per_channel_after_all_else():
    spec = replace(EXACT, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    crops, draws = make_crops(), augment_draws(EXACT, 0, 0, np.arange(24), 0)
    unit = augment(crops, draws, EXACT, torch.float32).double()
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (spec.mean, spec.std))
    ours = augment(crops, draws, spec, torch.float32)
    torch.testing.assert_close(ours.double(), (unit - mean) / std, atol=1e-6, rtol=0)
    half = augment(crops, draws, spec, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half == ours.bfloat16()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [EXACT, MATRIX], ids=lambda spec: spec.color)
def test_views_are_channels_last_in_memory_of_their_own_whatever_was_drawn(spec, dtype):
    everything, crops = replace(spec, flip=1.0, jitter=1.0, grayscale=1.0, blur=1.0, solarize=1.0), make_crops(8)
    for draws in (untouched(8), *(augment_draws(s, 0, 0, np.arange(8), 0) for s in (spec, everything))):
        views = augment(crops, draws, spec, dtype)
        assert views.stride() == (768, 1, 48, 3)
        assert views.dtype == dtype
        views.add_(1)
        assert torch.equal(crops, make_crops(8))


@pytest.mark.parametrize(
    ("moved", "least"), [({"late_blur": True}, 0.1), ({"early_solarize": True}, 0.3)], ids=["blur", "solarize"]
)
def test_operations_come_in_the_order_flip_blur_color_solarize(moved, least):
    spec = replace(EXACT, flip=1.0, jitter=1.0, blur=1.0, solarize=1.0)
    crops, draws = make_crops(24), augment_draws(spec, 0, 0, np.arange(24), 0)
    ours = augment(crops, draws, EXACT, torch.float32)
    expected = torch.stack([torchvision_view(crop, draws, row) for row, crop in enumerate(crops)])
    elsewhere = torch.stack([torchvision_view(crop, draws, row, **moved) for row, crop in enumerate(crops)])
    assert (expected - elsewhere).abs().max() > least
    # A pixel within the rounding error of solarize's threshold falls to either side of it.
    far = (expected - expected.round()).abs() < 0.4999
    assert far.double().mean() > 0.99
    torch.testing.assert_close(ours[far], expected[far], atol=1e-5, rtol=0)


def test_images_that_no_draw_chose_are_the_plain_crop_and_no_others():
    crops, draws = make_crops(96), augment_draws(EXACT, 0, 0, np.arange(96), 0)
    left = ~(draws.flip | jittered(draws) | draws.grayscale | draws.solarize | (draws.sigma > 0))
    spec = replace(EXACT, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    plain = normalize(to_unit(crops), spec.mean, spec.std, torch.float32)
    change = (augment(crops, draws, spec, torch.float32) - plain).abs().flatten(1).amax(1).numpy()
    assert 0 < left.sum() < 20
    assert change[left].max() < 2e-6
    assert change[~left].min() > 1e-4


def test_matrix_color_leaves_images_that_no_draw_chose_to_rounding():
    crops = make_crops(24)
    matrix, plain = augment(crops, untouched(24), MATRIX, torch.float32), to_unit(crops)
    torch.testing.assert_close(matrix, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", [EXACT, MATRIX], ids=lambda spec: spec.color)
def test_a_view_does_not_depend_on_its_batch(spec):
    crops, draws = make_crops(48), augment_draws(spec, 5, 0, np.arange(48), 0)
    views = augment(crops, draws, spec, torch.float32)
    for row in range(0, 48, 5):
        alone = AugmentDraws(**{name: getattr(draws, name)[row : row + 1] for name in draws.__dataclass_fields__})
        view = augment(crops[row : row + 1], alone, spec, torch.float32)
        torch.testing.assert_close(view[0], views[row], atol=1e-6, rtol=0)
