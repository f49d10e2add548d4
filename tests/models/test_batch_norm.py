"""All views in one forward with statistics per view, against one call of the plain network per view."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from fastsiam.methods import base, build_method
from fastsiam.models.batch_norm import (
    PerViewBatchNorm1d,
    PerViewBatchNorm2d,
    gains_by_view,
    split_statistics,
    view_by_view,
)
from tests.support.kernels_on_cpu import as_on_cuda
from tests.support.networks import NETWORKS, build

PER_VIEW = (PerViewBatchNorm1d, PerViewBatchNorm2d)


WAYS = {
    "at once": lambda network, num_views: network,
    "compiled": lambda network, num_views: torch.compile(network, fullgraph=True, backend="aot_eager"),
    "view by view": lambda network, num_views: lambda images: view_by_view(network, images, num_views),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_views_are_one_plain_call_per_view(name, num_views, way):
    torch._dynamo.reset()
    plain, images = build(name, num_views)
    split = split_statistics(deepcopy(plain), num_views)
    call = WAYS[way](split, num_views)
    # The second step reads the running statistics that the first one wrote.
    for step in range(2):
        x_plain, x_split = ((images + step).clone().requires_grad_() for _ in range(2))
        expected = torch.cat([plain(view) for view in x_plain.chunk(num_views)])
        got = call(x_split)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        (expected * weights).sum().backward()
        (got * weights).sum().backward()
        torch.testing.assert_close(x_split.grad, x_plain.grad, atol=1e-12, rtol=1e-11)
    for parameter, reference in zip(split.parameters(), plain.parameters(), strict=True):
        assert reference.grad.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(dict(split.named_buffers()), dict(plain.named_buffers()), atol=1e-13, rtol=1e-13)
    assert split[1].num_batches_tracked == 2 * num_views
    assert {layer.num_views for layer in split.modules() if isinstance(layer, PER_VIEW)} == {num_views}


@pytest.mark.needs("g++")
def test_compiled_by_inductor_a_step_in_fp32_is_the_plain_one():
    """Weights and statistics after a step of SGD; the eager form of a CPU is the plain call per view."""
    torch._dynamo.reset()
    plain, images = build("2d_channels_last", 2)
    networks = [split_statistics(deepcopy(plain).float(), 2) for _ in range(2)]
    calls = networks[0], torch.compile(networks[1], fullgraph=True)
    for network, call in zip(networks, calls, strict=True):
        (call(images.float()) ** 3).sum().backward()
        torch.optim.SGD(network.parameters(), lr=1e-4).step()
    eager, compiled = (network.state_dict() for network in networks)
    assert (eager["0.weight"] - plain.state_dict()["0.weight"]).abs().max() > 1e-4
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


def test_views_go_one_by_one_on_cuda_in_eager_mode_where_statistics_are_of_one_rank_and_view():
    plain, images = build("2d", 2)
    split = split_statistics(deepcopy(plain), 2)
    assert gains_by_view(split, as_on_cuda(images))
    assert not gains_by_view(split, images)
    assert not gains_by_view(plain, as_on_cuda(images))
    assert not gains_by_view(split_statistics(deepcopy(plain), 2, world_size=2), as_on_cuda(images))
    # The kernels need no views of their own.
    assert not gains_by_view(split, as_on_cuda(images.contiguous(memory_format=torch.channels_last)))
    assert not gains_by_view(split.eval(), as_on_cuda(images))


def test_a_method_that_sends_views_one_by_one_trains_the_same(tiny_config, monkeypatch):
    views = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for by_view in (False, True):
        torch.manual_seed(0)
        method = build_method(tiny_config()).double()
        calls = []
        method.encoder.register_forward_hook(lambda module, arguments, out, calls=calls: calls.append(len(out)))
        # The choice of a CUDA device, made on this one.
        monkeypatch.setattr(base, "gains_by_view", lambda module, images, by_view=by_view: by_view)
        loss = method([views])["loss"]
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
        found.append((calls, {"loss": loss.detach(), **gradients, **dict(method.named_buffers())}))
    (together, at_once), (apart, by_view) = found
    assert (together, apart) == ([16], [8, 8])
    torch.testing.assert_close(by_view, at_once, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_the_plain_layers_whose_state_dicts_fit(name):
    plain, images = build(name, 2)
    split = split_statistics(deepcopy(plain), 2)
    split(images)
    assert list(split.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(split.state_dict())
    split.load_state_dict(plain.state_dict())
    # Nine images do not divide into two views, and need not.
    split.eval()
    plain.eval()
    assert (split(images[:9]) == plain(images[:9])).all()
    assert split[1].num_batches_tracked == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_that_the_views_do_not_divide_raises_and_leaves_the_statistics(name):
    plain, images = build(name, 2)
    split = split_statistics(deepcopy(plain), 4)
    with pytest.raises(ValueError, match="a batch of 10 does not divide into 4 views"):
        split(images[:10])
    torch.testing.assert_close(split.state_dict(), plain.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.BatchNorm2d(4)], ids=["1d", "2d"])
def test_input_of_another_rank_raises_as_in_the_plain_layer(layer):
    images = torch.randn(4, 4, 2, 2) if isinstance(layer, nn.BatchNorm1d) else torch.randn(4, 4)
    with pytest.raises(ValueError, match="expected"):
        split_statistics(deepcopy(layer), 2)(images)


def test_channels_last_images_stay_channels_last():
    images = torch.randn(4, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    assert split_statistics(nn.BatchNorm2d(3), 2)(images).stride() == (90, 1, 15, 3)


def test_every_batch_norm_of_a_method_is_per_view_unless_joint_is_asked_for(tiny_config):
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    per_view, joint = (
        [m for m in build_method(tiny_config(f"model.bn_statistics={mode}")).modules() if isinstance(m, norms)]
        for mode in ("per_view", "joint")
    )
    # Stem, three blocks of two, two shortcuts; projector 2; predictor 1.
    assert len(per_view) == len(joint) == 12
    assert all(type(layer) in PER_VIEW and layer.num_views == 2 for layer in per_view)
    assert all(type(layer) in norms for layer in joint)
