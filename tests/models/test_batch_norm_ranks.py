"""Batch norm over the images of all ranks, in gloo processes, against one process with the whole batch."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.resnet import BasicBlock

from fastsiam.methods import build_method
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.encoder import build_encoder
from fastsiam.models.residual import fuse_residual_blocks
from tests.support.kernels_on_cpu import take_kernels
from tests.support.networks import NETWORKS, build, one_layer

BATCH = 8
STEPS, IMAGES, LEARNING_RATE = 20, 64, 0.05


def shard(images, num_views):
    """This rank's images of every view."""
    return images.unflatten(0, (num_views, -1)).chunk(dist.get_world_size(), 1)[dist.get_rank()].flatten(0, 1)


def joined(shards, num_views):
    """The whole batch of all ranks' shards."""
    return torch.cat([images.unflatten(0, (num_views, -1)) for images in shards], 1).flatten(0, 1)


def two_steps(network, images, weights):
    """Two forwards and backwards of the loss sum(out * weights): the second reads the first's running statistics."""
    for step in range(2):
        x = (images + step).requires_grad_()
        out = network(x)
        (out * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"out": out.detach(), "grad": x.grad, "gradients": gradients, "buffers": dict(network.named_buffers())}


def weights_like(images):
    return torch.rand(len(images), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def of_one_rank(name, num_views, dtype):
    plain, images = build(name, num_views, BATCH)
    network = split_statistics(plain.to(dtype), num_views, dist.get_world_size())
    weights = weights_like(images)
    shape = (-1, *[1] * (images.dim() - 1))
    return two_steps(network, shard(images, num_views).to(dtype), shard(weights, num_views).to(dtype).view(shape))


def of_the_whole_batch(name, num_views):
    plain, images = build(name, num_views, BATCH)
    shape = (-1, *[1] * (images.dim() - 1))
    weights = weights_like(images).view(shape)

    class PerView(nn.Module):
        def forward(self, x):
            return torch.cat([plain(view) for view in x.chunk(num_views)])

    found = PerView()
    found.named_parameters, found.named_buffers = plain.named_parameters, plain.named_buffers
    return two_steps(found, images, weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_ranks_batch_is_normalised_as_one(ranks, name, size, num_views, dtype, tolerance):
    found = ranks(size, of_one_rank, name, num_views, dtype)
    expected = of_the_whole_batch(name, num_views)

    def same(got, reference):
        # A convolution's weight gradient is a sum whose terms are as large as its largest entries.
        scale = max(1, reference.abs().max().item())
        torch.testing.assert_close(got.to(reference.dtype), reference, atol=tolerance * scale, rtol=0)

    assert expected["grad"].abs().max() > 1e-3
    for what in ("out", "grad"):
        assert {one[what].dtype for one in found} == {dtype}
        same(joined([one[what] for one in found], num_views), expected[what])
    for key, reference in expected["gradients"].items():
        assert reference.abs().max() > 1e-6
        same(sum(one["gradients"][key] for one in found), reference)
    for one in found:
        assert one["buffers"].keys() == expected["buffers"].keys()
        for key, reference in expected["buffers"].items():
            same(one["buffers"][key], reference)


def offset_images(dtype):
    """[V*N, C, H, W] of two views: channels of mean 1000 and spread 0.1, a little apart from image to image."""
    generator = torch.Generator().manual_seed(0)
    images = 1000 + 0.1 * torch.randn(2 * BATCH, 3, 6, 6, generator=generator, dtype=torch.float64)
    images += torch.arange(2 * BATCH).view(-1, 1, 1, 1) / 100
    return images.to(dtype, memory_format=torch.channels_last)


def offset_of_one_rank():
    layer = split_statistics(nn.BatchNorm2d(3, eps=0, momentum=1.0), 2, dist.get_world_size())
    return layer(shard(offset_images(torch.float32), 2)).detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("size", [2, 4])
def test_a_large_mean_does_not_cancel(ranks, size):
    images = offset_images(torch.float32)
    views = images.double().unflatten(0, (2, -1))
    variance, mean = torch.var_mean(views, (1, 3, 4), correction=0, keepdim=True)
    expected = ((views - mean) / variance.sqrt()).flatten(0, 1)
    # The mean of squares minus the square of the mean misses the variance, 0.01, by more than itself.
    assert ((images**2).mean((0, 2, 3)) - images.mean((0, 2, 3)) ** 2 - variance.mean()).abs().max() > 0.01
    found = ranks(size, offset_of_one_rank)
    # Rounding at 1000 is up to 3.1e-5; a mean is rounded twice, on its rank and over the ranks; a spread of 0.1 makes
    # ten times that of the output, and the deviations' squares make relative 3e-4 of the variance.
    torch.testing.assert_close(joined([out for out, _, _ in found], 2).double(), expected, atol=6.2e-4, rtol=1e-5)
    for _, running_mean, running_var in found:
        torch.testing.assert_close(running_mean.double(), mean[1].flatten(), atol=6.2e-5, rtol=0)
        torch.testing.assert_close(running_var.double(), views[1].var((0, 2, 3)), atol=0, rtol=3e-4)


def half_precision_of_one_rank():
    """One layer on bf16 images under autocast; whether strides stay."""
    torch.manual_seed(0)
    images = (3 + torch.randn(2 * BATCH, 8, 16, 16)).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(images.shape).to(torch.bfloat16)
    layer = split_statistics(nn.BatchNorm2d(8), 2, dist.get_world_size())
    x = shard(images, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.backward(shard(weights, 2))
    return out.detach(), x.grad, layer.running_mean, [out.stride() == x.stride(), x.grad.stride() == x.stride()]


def test_half_precision_has_fp32_statistics_and_keeps_its_strides(ranks):
    found = ranks(2, half_precision_of_one_rank)
    torch.manual_seed(0)
    images = (3 + torch.randn(2 * BATCH, 8, 16, 16)).to(torch.bfloat16).double().requires_grad_()
    weights = torch.randn(images.shape).to(torch.bfloat16).double()
    plain = nn.BatchNorm2d(8).double()
    expected = torch.cat([plain(view) for view in images.chunk(2)])
    expected.backward(weights)
    # Rounding to bf16's 8 bits moves a value by up to 2**-8 of itself.
    for number, reference in ((0, expected.detach()), (1, images.grad)):
        got = joined([one[number] for one in found], 2)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), reference, atol=1e-5, rtol=2.0**-7.99)
    for _, _, running_mean, strides in found:
        assert running_mean.dtype == torch.float32
        torch.testing.assert_close(running_mean.double(), plain.running_mean, atol=1e-6, rtol=0)
        assert strides == [True, True]


def kept_for_backward(backend):
    """Bytes that the autograd graph of a bf16 ResNet block keeps, with plain layers and with those of all ranks."""
    kept = []
    for world_size in (1, dist.get_world_size()):
        torch._dynamo.reset()
        block = split_statistics(BasicBlock(8, 8), 2, world_size).to(memory_format=torch.channels_last)
        call = torch.compile(block, fullgraph=True, backend=backend) if backend else block
        images = torch.randn(2 * BATCH, 8, 16, 16).contiguous(memory_format=torch.channels_last)
        bytes_of = {}

        def keep(tensor, bytes_of=bytes_of):
            bytes_of[tensor.data_ptr()] = tensor.nbytes
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            out = call(images)
        out.sum().backward()
        kept.append(sum(bytes_of.values()))
    return kept


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_backward_keeps_no_more_than_with_plain_layers(ranks, backend):
    for plain, across in ranks(2, kept_for_backward, backend):
        assert plain > 2 * BATCH * 8 * 16 * 16
        assert across < 1.05 * plain


def evaluated_on_one_rank():
    layer = split_statistics(nn.BatchNorm1d(4), 2, dist.get_world_size()).eval()
    images = torch.randn(4, 4)
    # A collective that the other rank does not join would not return.
    return dist.get_rank() == 1 or torch.equal(layer(images), nn.BatchNorm1d(4).eval()(images))


def test_evaluation_needs_no_other_rank(ranks):
    assert ranks(2, evaluated_on_one_rank) == [True, True]


def train(config, dtype, backend, world_size, joint=False):
    """(losses, state dict) of 20 steps on 64 images; `config` None is `one_layer`.

    `world_size` is what the layers and the gradients are told; the images are shared by the ranks that there are.
    """
    torch.manual_seed(0)
    method = build_method(config, world_size) if config else split_statistics(one_layer(), 1 + (not joint), world_size)
    method = method.to(dtype, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), lr=LEARNING_RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = torch.compile(method, fullgraph=True, backend=backend) if backend else method
    losses = []
    for _ in range(STEPS):
        views = torch.randn(2 * IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
        views[IMAGES:] = 0.5 * views[:IMAGES] + views[IMAGES:] + 0.3
        if ranks > 1:
            views = shard(views, 2)
        loss = call([views.to(dtype)])["loss"]
        optimizer.zero_grad()
        loss.backward()
        mean_loss = loss.detach().clone()
        if ranks > 1:
            for value in (mean_loss, *(parameter.grad for parameter in method.parameters())):
                dist.all_reduce(value)
                value /= ranks
        optimizer.step()
        losses.append(mean_loss.item())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return losses, method.state_dict(), graphs


def train_strictly(*arguments):
    """`train`, where a deprecated call or a second compilation is an error."""
    with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
        warnings.simplefilter("error", FutureWarning)
        return train(*arguments)


def difference(one, other):
    """The largest |a - b| / (1 + |b|) over losses, weights and running statistics of two trainings."""
    pairs = [(torch.tensor(one[0]), torch.tensor(other[0])), *((one[1][key], other[1][key]) for key in other[1])]
    return max(((a - b).abs() / (1 + b.abs())).max().item() for a, b in pairs)


# Model, statistics, dtype, tolerance, and the compiler's backend on two ranks; the one rank is eager.
CASES = {
    "resnet, float64": ("resnet", "per_view", torch.float64, 1e-9, None),
    "resnet, float64, aot_eager": ("resnet", "per_view", torch.float64, 1e-9, "aot_eager"),
    "one layer, float64, joint": ("one layer", "joint", torch.float64, 1e-9, None),
    "one layer, float32": ("one layer", "per_view", torch.float32, 1e-5, None),
    "one layer, float32, inductor": ("one layer", "per_view", torch.float32, 1e-5, "inductor"),
}


COMPILED = pytest.param("one layer, float32, inductor", marks=pytest.mark.needs("g++"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*(case for case in CASES if case not in COMPILED.values), COMPILED])
def test_two_ranks_train_as_one(ranks, tiny_config, case):
    model, mode, dtype, tolerance, backend = CASES[case]
    config = tiny_config(f"model.bn_statistics={mode}", "model.zero_init_residual=false") if model == "resnet" else None
    expected = train(config, dtype, None, 1, mode == "joint")
    found = ranks(2, train_strictly, config, dtype, backend, 2, mode == "joint")
    assert abs(expected[0][0] - expected[0][-1]) > 0.02
    for one in found:
        assert difference(one, expected) < tolerance
        assert one[2] == (1 if backend else 0)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True], ids=["per_view", "joint"])
def test_statistics_left_to_each_rank_are_another_training(ranks, joint):
    """The tests above can fail."""
    expected = train(None, torch.float64, None, 1, joint)
    for one in ranks(2, train_strictly, None, torch.float64, None, 1, joint):
        assert difference(one, expected) > 1e-2


def fused_of_one_rank():
    """A step of fused blocks, by the kernels, on this rank's half of each view."""
    torch.manual_seed(0)
    network = build_encoder("cifar_resnet8", "cifar", 4, False).double().to(memory_format=torch.channels_last)
    fuse_residual_blocks(split_statistics(network, 2, dist.get_world_size()))
    with pytest.MonkeyPatch.context() as patch:
        take_kernels(patch)
        return two_steps(network, shard(residual_images(), 2), 1.0)


def residual_images():
    x = torch.randn(2 * BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def test_fused_residual_blocks_over_two_ranks_are_those_of_one(ranks):
    torch.manual_seed(0)
    plain = build_encoder("cifar_resnet8", "cifar", 4, False).double().to(memory_format=torch.channels_last)
    expected = two_steps(split_statistics(plain, 2), residual_images(), 1.0)
    found = ranks(2, fused_of_one_rank)
    torch.testing.assert_close(joined([one["out"] for one in found], 2), expected["out"], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(joined([one["grad"] for one in found], 2), expected["grad"], atol=1e-10, rtol=1e-9)
    for key, reference in expected["gradients"].items():
        torch.testing.assert_close(sum(one["gradients"][key] for one in found), reference, atol=1e-10, rtol=1e-9)
    for one in found:
        torch.testing.assert_close(one["buffers"], expected["buffers"], atol=1e-12, rtol=1e-11)
