"""views.count: K views of each image from one decode, one forward, the loss over all ordered pairs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsiam.config.views import RECIPES
from fastsiam.data import decode, rng
from fastsiam.methods import build_method
from fastsiam.models.batch_norm import PerViewBatchNorm1d, PerViewBatchNorm2d
from fastsiam.train import main
from tests.support.loaders import make
from tests.support.runs import numbers, train_here

SPEC = dataclasses.replace(RECIPES["simsiam"], size=16)


def views_of(count, images=4, size=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # Each view has statistics of its own.
    shift = torch.arange(count, dtype=dtype).repeat_interleave(images).view(-1, 1, 1, 1)
    return torch.randn(count * images, 3, size, size, generator=generator, dtype=dtype) * (1 + shift / 2) + shift


def one_call_per_view(method, views, count):
    """The loss by the plain network, called once for each view, and a loop over all ordered pairs."""
    z = [method.projector(method.encoder(view)) for view in views.chunk(count)]
    p = [method.predictor(each) for each in z]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return sum(-F.cosine_similarity(p[i], z[j].detach()).mean() for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_step_is_that_of_one_call_per_view_and_a_loop_over_pairs(tiny_config, count):
    """In fp64: loss, gradients, and running statistics, which have seen each view by itself."""
    config = tiny_config(f"views.count={count}")
    torch.manual_seed(0)
    method = build_method(config).double()
    plain = build_method(tiny_config("model.bn_statistics=joint")).double()
    plain.load_state_dict(method.state_dict())
    for step in range(2):
        views = views_of(count, seed=step, dtype=torch.float64)
        method.zero_grad()
        plain.zero_grad()
        out, expected = method([views]), one_call_per_view(plain, views, count)
        assert out["z"].shape == (count * 4, 16)
        assert out["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
        out["loss"].backward()
        expected.backward()
        theirs = dict(plain.named_parameters())
        for name, parameter in method.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(dict(method.named_buffers()), dict(plain.named_buffers()), atol=1e-12, rtol=1e-10)
    norms = [module for module in method.modules() if isinstance(module, PerViewBatchNorm1d | PerViewBatchNorm2d)]
    assert {module.num_views for module in norms} == {count}
    assert {int(module.num_batches_tracked) for module in norms} == {2 * count}


def test_two_views_are_bit_equal_to_the_papers_loss(tiny_config):
    """What ran before there was a count: chunks of z and p into the kernel's Eq. 2."""
    from fastsiam.kernels import negative_cosine

    torch.manual_seed(0)
    method = build_method(tiny_config("views.count=2"))
    before = copy.deepcopy(method)
    views = views_of(2)
    z = before.embed(views)
    loss = negative_cosine(*before.predictor(z).chunk(2), *z.chunk(2))
    out = method([views])
    assert torch.equal(out["loss"], loss)
    out["loss"].backward()
    loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(method.parameters(), before.parameters(), strict=True))


@pytest.mark.slow
def test_three_views_are_one_graph(tiny_config):
    torch._dynamo.reset()
    method = build_method(tiny_config("views.count=3"))
    compiled = torch.compile(copy.deepcopy(method), fullgraph=True, backend="aot_eager")
    views = views_of(3)
    assert compiled([views])["loss"].item() == pytest.approx(method([views])["loss"].item(), abs=1e-6)


def made_of(photos, count):
    return make(photos, "pil", spec=SPEC, count=count, batch_size=8)


def test_the_first_views_stay_and_each_further_one_has_its_own_draws(photos):
    two, four = (made_of(photos, count) for count in (2, 4))
    for few, many in zip(two.epoch(1), four.epoch(1), strict=True):
        assert many.views[0].shape == (32, 3, 16, 16)
        assert many.views[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(few.views[0], many.views[0][:16])
        views = many.views[0].reshape(4, 8, -1)
        for one in range(4):
            for other in range(one):
                assert (views[one] - views[other]).abs().mean(1).min() > 0.05


def test_draws_of_further_views_are_spread_as_those_of_the_first():
    """Mean of the crop's area and of the flips over 4,000 images, in standard errors of independent draws."""
    sizes, indices = np.tile([[200, 300]], (4000, 1)), np.arange(4000)
    areas, flips = [], []
    for view in range(5):
        boxes = rng.crop_boxes(SPEC, 0, 0, indices, view, sizes)
        areas.append(boxes[:, 2] * boxes[:, 3] / 60_000)
        flips.append(rng.augment_draws(SPEC, 0, 0, indices, view).flip)
    for view in range(1, 5):
        assert abs(areas[view].mean() - areas[0].mean()) < 4 * areas[0].std() * (2 / 4000) ** 0.5
        for earlier in range(view):
            assert abs(np.corrcoef(areas[view], areas[earlier])[0, 1]) < 4 / 4000**0.5
            assert abs((flips[view] == flips[earlier]).mean() - 0.5) < 4 * 0.5 / 4000**0.5


def test_pil_decodes_an_image_once_for_all_its_views(photos, monkeypatch):
    calls = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda path, *more: calls.append(path) or real(path, *more))
    made = made_of(photos, 3)
    assert sum(len(batch.views[0]) for batch in made.epoch(0)) == 48
    assert sorted(calls) == sorted(made.source.path(index) for index in range(16))


def test_stopped_in_mid_epoch_a_run_of_three_views_goes_on_bit_by_bit(tiny, tmp_path, capsys):
    """It counts images, not views, and says so."""
    three = ("views.count=3", "evaluate.knn_every_epochs=null")
    assert main(["--config", "quickstart", *tiny(*three, "run.name=whole")]) == 0
    said, seen = capsys.readouterr().out, numbers(tmp_path / "runs/whole", "train", "step", "images_seen")
    assert "views     3 x 16 px of each image, recipe demo" in said
    assert (seen[:, 1] == 8 * seen[:, 0]).all()
    assert f"done      {len(seen)} steps, {8 * len(seen)} images in" in said
    for steps in (4, 13, "null"):
        assert main(["--config", "quickstart", *tiny(*three, "run.name=parts", f"train.max_steps={steps}")]) == 0
    whole, parts = (tmp_path / "runs" / name for name in ("whole", "parts"))
    a, b = numbers(whole, "train", "step", "loss", "lr"), numbers(parts, "train", "step", "loss", "lr")
    assert np.array_equal(a, b)
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["method"] for folder in (whole, parts)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.slow
def test_two_ranks_of_16_images_are_one_of_32(ranks, tiny, tmp_path):
    """Three views that grow, in steps at both sizes."""
    growing = ("train.batch_size=32", "views.count=3", "views.size=16..24", "optimizer.base_lr=0.05", "train.epochs=3")
    _, alone = train_here(tiny(*growing, "data.val=null", "run.name=one"))
    results = ranks(2, train_here, tiny(*growing, "data.val=null", "run.name=two"))
    for step, (epoch, indices) in enumerate(alone):
        parts = [seen[step] for _, seen in results]
        assert [part[0] for part in parts] == [epoch, epoch]
        assert parts[0][1] + parts[1][1] == indices
        assert len(parts[0][1]) == 16
    one, two = (numbers(tmp_path / "runs" / name, "train", "step", "view_size", "loss") for name in ("one", "two"))
    assert one[:, 1].tolist() == [16, 16, 16, 16, 24, 24]
    # fp32: the order of sums differs.
    np.testing.assert_allclose(two, one, atol=5e-4)
