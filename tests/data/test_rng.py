"""What the draws of an epoch are distributed as, and that they depend on nothing but their address.

The bounds are 4.5 standard deviations, or a Kolmogorov-Smirnov distance exceeded once in 1,000 draws: with the fixed
seeds a test passes or fails for good.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastsiam.config.views import ViewSpec
from fastsiam.data import rng
from tests.support.loaders import jittered

N = 20_000
INDICES = np.arange(N)
SPEC = ViewSpec(size=224, color="exact", solarize=0.2)
ALWAYS = replace(SPEC, jitter=1.0, blur=1.0)
SWITCHES = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2}
RATIO = (3 / 4, 4 / 3)
SIGMAS = 4.5
KS = 1.95


def switch(drawn, name):
    return {"blur": drawn.sigma > 0, "jitter": jittered(drawn)}.get(name, getattr(drawn, name, None))


def ks_distance(values, low, high):
    """Largest gap between the empirical distribution of `values` and the uniform one on [low, high]."""
    share = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(share) + 1) / len(share)
    return max((steps[1:] - share).max(), (share - steps[:-1]).max())


def assert_uniform(values, low, high):
    assert values.min() >= low
    assert values.max() <= high
    assert ks_distance(values, low, high) < KS / len(values) ** 0.5


def largest_correlation(columns):
    correlation = np.corrcoef(np.stack(columns).astype(np.float64))
    return np.abs(correlation - np.eye(len(columns))).max()


def same_sizes(height, width, count=N):
    return np.tile([[height, width]], (count, 1))


@pytest.mark.parametrize(("epoch", "view"), [(0, 0), (0, 1), (7, 0)])
@pytest.mark.parametrize("name", SWITCHES)
def test_switch_turns_at_its_probability(name, epoch, view):
    probability = SWITCHES[name]
    share = switch(rng.augment_draws(SPEC, 1, epoch, INDICES, view), name).mean()
    assert abs(share - probability) < SIGMAS * (probability * (1 - probability) / N) ** 0.5


@pytest.mark.parametrize("name", SWITCHES)
def test_probability_zero_is_never_and_one_is_always(name):
    for probability in (0.0, 1.0):
        drawn = switch(rng.augment_draws(replace(SPEC, **{name: probability}), 0, 0, INDICES, 0), name)
        assert drawn.mean() == probability


@pytest.mark.parametrize("view", [0, 1])
def test_color_factors_are_uniform_in_their_ranges(view):
    spec = replace(ALWAYS, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    factors = rng.augment_draws(spec, 2, 3, INDICES, view).factors.astype(np.float64)
    ranges = ((0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1))
    for column, (low, high) in zip(factors.T, ranges, strict=True):
        # The factors are stored in fp32, whose rounding may pass a bound by 6e-8.
        assert_uniform(column, low - 1e-7, high + 1e-7)


def test_all_color_orders_are_equally_likely():
    order = rng.augment_draws(SPEC, 0, 0, INDICES, 1).order
    rows, counts = np.unique(order, axis=0, return_counts=True)
    assert (np.sort(rows, axis=1) == np.arange(4)).all()
    assert len(rows) == 24
    # Chi-squared with 23 degrees of freedom has mean 23 and variance 46.
    chi_squared = ((counts - N / 24) ** 2 / (N / 24)).sum()
    assert chi_squared < 23 + SIGMAS * 46**0.5


def test_blur_sigma_is_uniform_where_blurred_and_zero_elsewhere():
    drawn = rng.augment_draws(SPEC, 4, 0, INDICES, 0)
    blurred = drawn.sigma[drawn.sigma > 0].astype(np.float64)
    assert_uniform(blurred, 0.1 - 1e-7, 2.0 + 1e-7)
    assert abs(len(blurred) / N - 0.5) < SIGMAS * 0.5 / N**0.5


def test_crop_area_ratio_and_place_are_uniform_where_every_box_fits():
    # At half of a square and ratio 4/3 the longer side is 0.82 of the square's: the first attempt always fits.
    side, spec = 100_000, replace(SPEC, crop_scale=(0.1, 0.5))
    top, left, height, width = rng.crop_boxes(spec, 0, 0, INDICES, 0, same_sizes(side, side)).T.astype(np.float64)
    rounding = 1e-4
    assert_uniform(height * width / side**2, 0.1 - rounding, 0.5 + rounding)
    assert_uniform(np.log(width / height), np.log(3 / 4) - rounding, np.log(4 / 3) + rounding)
    assert_uniform((top + 0.5) / (side - height + 1), 0, 1)
    assert_uniform((left + 0.5) / (side - width + 1), 0, 1)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (224, 224), (200, 640)])
def test_crop_boxes_are_distributed_as_torchvisions(size):
    count = 5_000
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, SPEC.crop_scale, RATIO) for _ in range(count)])
    ours = rng.crop_boxes(SPEC, 0, 0, INDICES, 0, same_sizes(*size))
    bound = KS * (1 / count + 1 / N) ** 0.5
    described = [(*box.T, box[:, 2] * box[:, 3], box[:, 3] / box[:, 2]) for box in (ours, theirs)]
    for a, b in zip(*described, strict=True):
        a, b = np.sort(a), np.sort(b)
        grid = np.concatenate((a, b))
        gap = np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)
        assert np.abs(gap).max() < bound


def test_crop_boxes_lie_inside_images_of_any_size():
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(0, np.log(3000), (N, 2))).astype(np.int64)
    sizes[:3] = (1, 1), (1, 3000), (3000, 1)
    top, left, height, width = rng.crop_boxes(SPEC, 0, 0, INDICES, 1, sizes).T
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) == 1
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()


def test_extreme_images_get_torchvisions_fallback_box():
    # At 20:1 a fifth of the area is at least 1.7 times as high as the image: no attempt can fit.
    generator = np.random.default_rng(1)
    short = generator.integers(1, 60, 200)
    long = (short * generator.uniform(20, 40, 200)).astype(np.int64)
    sizes = np.concatenate((np.stack((short, long), 1), np.stack((long, short), 1)))
    ours = rng.crop_boxes(SPEC, 0, 0, np.arange(400), 0, sizes)
    theirs = [RandomResizedCrop.get_params(torch.empty(3, *size), SPEC.crop_scale, RATIO) for size in sizes.tolist()]
    assert (ours == np.array(theirs)).all()


def test_an_image_of_allowed_ratio_that_no_attempt_fits_is_taken_whole():
    boxes = rng.crop_boxes(replace(SPEC, crop_scale=(1.0, 1.0)), 0, 0, INDICES[:500], 0, same_sizes(300, 330, 500))
    assert (boxes == (0, 0, 300, 330)).all()


@pytest.mark.parametrize(
    "other", [{"view": 1}, {"epoch": 1}, {"seed": 1}, {"seed": 2**62}], ids=["view", "epoch", "seed", "large_seed"]
)
def test_another_view_epoch_or_seed_draws_something_unrelated(other):
    def columns(seed=0, epoch=0, view=0):
        drawn = rng.augment_draws(ALWAYS, seed, epoch, INDICES, view)
        boxes = rng.crop_boxes(SPEC, seed, epoch, INDICES, view, same_sizes(375, 500))
        return [*drawn.factors.T, drawn.sigma, drawn.flip, drawn.grayscale, *boxes.T]

    for one, two in zip(columns(), columns(**other), strict=True):
        assert abs(np.corrcoef(one, two)[0, 1]) < SIGMAS / N**0.5
    same = np.mean([(one == two).mean() for one, two in zip(columns()[:5], columns(**other)[:5], strict=True)])
    assert same < 0.001


def test_an_address_draws_the_same_in_any_batch():
    some = np.array([5, 9, 1, 19_999])
    sizes = np.random.default_rng(0).integers(50, 600, (N, 2))
    every, few = (rng.augment_draws(SPEC, 3, 2, indices, 1) for indices in (INDICES, some))
    for name in every.__dataclass_fields__:
        assert (getattr(every, name)[some] == getattr(few, name)).all()
    boxes = rng.crop_boxes(SPEC, 3, 2, INDICES, 1, sizes)
    assert (boxes[some] == rng.crop_boxes(SPEC, 3, 2, some, 1, sizes[some])).all()


def test_the_draws_of_an_image_are_independent_of_each_other():
    drawn = rng.augment_draws(ALWAYS, 0, 0, INDICES, 0)
    jitter = jittered(rng.augment_draws(SPEC, 0, 0, INDICES, 0))
    blur = rng.augment_draws(SPEC, 0, 0, INDICES, 0).sigma > 0
    # Half of a square at most: boxes fit at the first attempt, and area and ratio stay independent.
    boxes = rng.crop_boxes(replace(SPEC, crop_scale=(0.1, 0.5)), 0, 0, INDICES, 0, same_sizes(9999, 9999))
    top, left, height, width = boxes.T.astype(np.float64)
    columns = [drawn.flip, jitter, *drawn.factors.T, *drawn.order.T[:2], drawn.grayscale, blur, drawn.sigma]
    columns += [drawn.solarize, height * width, width / height, top / (10_000 - height), left / (10_000 - width)]
    correlation = np.corrcoef(np.stack(columns).astype(np.float64))
    # First and second place of an order exclude each other: -1/3 by construction.
    first, second = 6, 7
    assert abs(correlation[first, second] + 1 / 3) < SIGMAS / N**0.5
    correlation[first, second] = correlation[second, first] = 0
    assert np.abs(correlation - np.eye(len(columns))).max() < SIGMAS / N**0.5


def test_uniform_numbers_are_uniform_and_independent_over_slots_views_epochs_and_neighbours():
    slots = [*range(14), *range(1000, 1040)]
    columns = [rng.uniform(0, 0, INDICES, 0, slot) for slot in slots]
    columns += [rng.uniform(0, 0, INDICES, 1, slot) for slot in slots]
    columns += [rng.uniform(0, 1, INDICES, 0, slot) for slot in slots]
    columns += [rng.uniform(1, 0, INDICES, 0, slot) for slot in slots]
    columns += [np.roll(column, lag) for column in columns[:14] for lag in (1, 2, 8, 64)]
    for column in columns:
        assert column.min() >= 0
        assert column.max() < 1
        # 272 columns: 3.0 is exceeded once in 30 million.
        assert ks_distance(column, 0, 1) < 3.0 / N**0.5
    # 37,000 pairs: a normal variable passes 6 sigma once in 500 million.
    assert largest_correlation(columns) < 6 / N**0.5


def test_epoch_order_is_another_random_permutation_each_epoch():
    orders = [rng.epoch_order(0, epoch, 5_000) for epoch in range(3)] + [rng.epoch_order(1, 0, 5_000)]
    for order in orders:
        assert (np.sort(order) == np.arange(5_000)).all()
    assert largest_correlation([np.arange(5_000), *orders]) < SIGMAS / 5_000**0.5
    assert (rng.epoch_order(0, 2, 5_000) == orders[2]).all()


def test_the_first_place_of_an_epoch_is_anyones():
    first = np.array([rng.epoch_order(0, epoch, 100)[0] for epoch in range(2_000)])
    assert ks_distance((first + 0.5) / 100, 0, 1) < KS / 2_000**0.5
    assert len(set(first.tolist())) == 100


def test_probe_images_are_a_fixed_sorted_sample_without_repeats():
    probe = rng.probe_indices(0, 10_000, 256)
    assert len(np.unique(probe)) == 256
    assert (np.diff(probe) > 0).all()
    assert ks_distance(probe / 10_000, 0, 1) < KS / 256**0.5
    assert (probe == rng.probe_indices(0, 10_000, 256)).all()
    assert len(np.intersect1d(probe, rng.probe_indices(1, 10_000, 256))) < 30
    assert (rng.probe_indices(0, 7, 256) == np.arange(7)).all()


def test_center_box_is_the_middle_of_the_image():
    sizes = np.array([(256, 341), (500, 375), (1, 9), (33, 32), (300, 9)])
    expected = [(16, 58, 224, 224), (86, 23, 328, 328), (0, 4, 1, 1), (2, 2, 28, 28), (146, 0, 8, 8)]
    assert (rng.center_boxes(sizes, 0.875) == expected).all()
    assert (rng.center_boxes(sizes[:1], 1.0) == [(0, 42, 256, 256)]).all()


def test_concatenated_draws_keep_the_order_of_their_parts():
    parts = [rng.augment_draws(SPEC, 0, 0, INDICES[:40], view) for view in (0, 1)]
    both = rng.AugmentDraws.concatenate(parts)
    for name in both.__dataclass_fields__:
        for half, part in zip(np.split(getattr(both, name), 2), parts, strict=True):
            assert (half == getattr(part, name)).all()


def test_the_finaliser_is_splitmix64s():
    # First three outputs of splitmix64 from state 0 (Vigna's splitmix64.c).
    states = np.array([1, 2, 3], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert rng._mix(states).tolist() == expected


def test_the_finaliser_is_the_same_in_pythons_integers():
    states = [0, 1, 0x9E3779B97F4A7C15, 2**63, 2**64 - 1]
    assert [rng._mix(state) for state in states] == rng._mix(np.array(states, np.uint64)).tolist()


def test_a_draw_is_splitmix64_chained_over_its_address():
    """Epoch, view, slot, then the image; in Python's integers, step by step as the specification of old runs."""

    def chained(seed, epoch, index, view, slot):
        golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
        key = rng._mix((seed + golden) & mask)
        for word in (epoch, view, slot):
            key = rng._mix(((key ^ word) + golden) & mask)
        return rng._mix(rng._mix(((index ^ key) + golden) & mask) ^ key)

    indices, slots = np.array([0, 7, 2**40]), (3, 1000, 1039)
    for seed, epoch, view in ((0, 0, 0), (2**63 + 5, 799, 7)):
        expected = [[(chained(seed, epoch, int(i), view, slot) >> 11) * 2.0**-53 for i in indices] for slot in slots]
        assert rng.uniforms(seed, epoch, indices, view, slots).tolist() == expected


def test_a_box_is_that_of_the_first_attempt_that_fits():
    """One image and one attempt at a time, as torchvision's loop."""
    sizes = np.random.default_rng(0).integers(1, 600, (300, 2))
    sizes[:20, 0] = 5
    boxes = rng.crop_boxes(SPEC, 3, 4, INDICES[:300], 1, sizes)
    attempts = []
    for index, (height, width), box in zip(INDICES[:300], sizes, boxes, strict=True):
        for attempt in range(10):
            a, r, t, left = rng.uniforms(3, 4, np.array([index]), 1, range(1000 + 4 * attempt, 1004 + 4 * attempt))[
                :, 0
            ]
            area = height * width * (SPEC.crop_scale[0] + (SPEC.crop_scale[1] - SPEC.crop_scale[0]) * a)
            ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * r)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                assert box.tolist() == [int(t * (height - h + 1)), int(left * (width - w + 1)), h, w]
                attempts.append(attempt)
                break
    assert set(attempts) >= {0, 1, 2, 3}
