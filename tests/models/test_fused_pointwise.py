"""Bottlenecks whose last convolution is in the join against the libraries', under Triton's interpreter or on a GPU."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from fastsiam.config import load_config
from fastsiam.kernels import pointwise
from fastsiam.methods import build_method
from fastsiam.models import fused_pointwise, residual
from fastsiam.models.batch_norm import split_statistics
from fastsiam.models.recompute import recompute_activations
from fastsiam.models.residual import fuse_pointwise, fuse_residual_blocks
from tests.models.test_batch_norm_ranks import joined, shard, two_steps
from tests.models.test_residual import DEVICE, assert_same, images, step, timm_network
from tests.support.kernels_on_cpu import as_on_cuda, take_kernels
from tests.support.refusals import refuses

if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu

SHORTCUTS = {"identity": (16, 1), "downsampling": (8, 1), "downsampling by 2": (8, 2)}


def bottleneck(shortcut, views=2, world_size=1):
    """torchvision's, of 4 channels inside and 16 outside, in fp64."""
    torch.manual_seed(0)
    channels, stride = SHORTCUTS[shortcut]
    down = None
    if shortcut != "identity":
        down = nn.Sequential(nn.Conv2d(channels, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    block = resnet.Bottleneck(channels, 4, stride, down)
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    block = block.double().to(DEVICE, memory_format=torch.channels_last)
    return split_statistics(block, views, world_size)


def fused(network):
    return fuse_pointwise(fuse_residual_blocks(copy.deepcopy(network)), "a network")


def images_of(shortcut, batch=6, size=6):
    x = torch.randn(batch, SHORTCUTS[shortcut][0], size, size, generator=torch.Generator().manual_seed(0)).double()
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last)


def calls_of(monkeypatch):
    calls, join = [], pointwise.join_op
    monkeypatch.setattr(pointwise, "join_op", lambda *arguments: calls.append(arguments) or join(*arguments))
    return calls


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_step_is_the_librarys(shortcut, views, monkeypatch):
    plain = bottleneck(shortcut, views)
    mine = fused(plain)
    calls = calls_of(monkeypatch)
    # The second pass adds its gradients to the first one's, and moves running statistics on.
    for number in range(2):
        expected = step(plain, images_of(shortcut) + number)
        with monkeypatch.context() as patch:
            take_kernels(patch)
            assert_same(step(mine, images_of(shortcut) + number), expected)
    assert len(calls) == 2
    assert list(mine.state_dict()) == list(plain.state_dict())
    assert mine.bn3.num_batches_tracked == 2 * views


def test_a_network_of_them_is_timms(monkeypatch):
    """A ResNet-D, whose shortcuts pool; all blocks but the last give their result to two users."""
    torch.manual_seed(0)
    network = timm_network(avg_down=True, stem_type="deep", stem_width=4).double()
    plain = split_statistics(network.to(DEVICE, memory_format=torch.channels_last), 2)
    mine, expected = fused(plain), step(plain, images())
    take_kernels(monkeypatch)
    calls = calls_of(monkeypatch)
    assert_same(step(mine, images()), expected)
    assert len(calls) == 5


def test_elsewhere_nothing_changes(monkeypatch):
    """Without the kernels, in evaluation, for other layouts, and, on CUDA, in fp32."""
    plain = bottleneck("downsampling by 2")
    mine, x = fused(plain), images_of("downsampling by 2")
    assert fused_pointwise.takes_pointwise(as_on_cuda(x.bfloat16()), mine.bn2, mine.bn3)
    assert not fused_pointwise.takes_pointwise(as_on_cuda(x), mine.bn2, mine.bn3)
    calls = calls_of(monkeypatch)
    if DEVICE == "cpu":
        assert_same(step(mine, x), step(plain, x))
    take_kernels(monkeypatch)
    with torch.no_grad():
        assert torch.equal(mine.eval()(x), plain.eval()(x))
    mine, plain = (network.train().to(memory_format=torch.contiguous_format) for network in (mine, plain))
    with torch.no_grad():
        torch.testing.assert_close(mine(x.contiguous()), plain(x.contiguous()), atol=1e-12, rtol=1e-12)
    assert not calls


def test_a_step_compiles_to_one_graph(monkeypatch):
    torch._dynamo.reset()
    plain = bottleneck("downsampling by 2")
    mine, x = fused(plain), images_of("downsampling by 2")
    expected = step(plain, x)
    take_kernels(monkeypatch)
    call = torch.compile(mine, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert_same(step(mine, x, call), expected)


def test_a_recomputed_block_moves_its_statistics_once(monkeypatch):
    plain = bottleneck("identity")
    mine, x = nn.Sequential(fused(plain)), images_of("identity")
    assert isinstance(recompute_activations(mine, "a network")[0], residual._Fused)
    expected = step(nn.Sequential(plain), x)
    take_kernels(monkeypatch)
    assert_same(step(mine, x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_what_is_of_weights_stays_fp32(dtype, monkeypatch):
    """Half precision where the library has it; the statistics' products too would lose three digits."""
    block, x = bottleneck("identity").float(), images_of("identity").float()
    take_kernels(monkeypatch)
    seen, take_in = [], pointwise.take_in_op
    monkeypatch.setattr(pointwise, "take_in_op", lambda *arguments: seen.append(arguments[0]) or take_in(*arguments))
    with torch.autocast(DEVICE, dtype):
        y = fused(block)(x.to(dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert {statistics.dtype for statistics in seen} == {torch.float32}


def of_one_rank(shortcut):
    """Two steps by the kernels on this rank's half of each view."""
    with pytest.MonkeyPatch.context() as patch:
        take_kernels(patch)
        return two_steps(fused(bottleneck(shortcut, 2, 2)), shard(images_of(shortcut, 8, 4), 2), 1.0)


@pytest.mark.parametrize("shortcut", ["identity", "downsampling by 2"])
def test_two_ranks_are_one(ranks, shortcut):
    expected = two_steps(bottleneck(shortcut), images_of(shortcut, 8, 4), 1.0)
    found = ranks(2, of_one_rank, shortcut)
    for key in ("out", "grad"):
        torch.testing.assert_close(joined([one[key] for one in found], 2), expected[key], atol=1e-10, rtol=1e-9)
    for key, reference in expected["gradients"].items():
        torch.testing.assert_close(sum(one["gradients"][key] for one in found), reference, atol=1e-9, rtol=1e-9)
    for one in found:
        torch.testing.assert_close(one["buffers"], expected["buffers"], atol=1e-12, rtol=1e-11)


def test_a_method_takes_it_by_its_config():
    config = ["model.encoder=resnet50", "model.stem=imagenet", "model.width=null", "data.backend=synthetic"]
    for on in (False, True):
        with torch.device("meta"):
            method = build_method(load_config("quickstart", [*config, f"model.fused_pointwise={str(on).lower()}"]))
        assert sum(getattr(module, "is_pointwise", False) for module in method.modules()) == 16 * on


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["model.encoder=resnet34"], "no-bottlenecks"),
        (["model.encoder=vgg11", "model.zero_init_residual=false"], "no-bottlenecks"),
        (["model.encoder=cifar_resnet8", "model.stem=cifar", "model.width=8"], "no-bottlenecks"),
        (["train.channels_last=false"], "pointwise-without-kernels"),
        (["train.precision=fp32"], "pointwise-without-kernels"),
    ],
)
def test_what_cannot_use_it_is_refused(overrides, code):
    with refuses(code, "model.fused_pointwise"):
        load_config("r50_100ep", ["model.fused_pointwise=true", *overrides])


def test_networks_without_fused_bottlenecks_are_refused():
    """Statistics of all views together are not per view; timm's names do not tell what a network is of."""
    for network in (resnet.resnet50(), split_statistics(resnet.resnet18(), 2)):
        with refuses("no-bottlenecks", "model.fused_pointwise"):
            fuse_pointwise(fuse_residual_blocks(network), "timm:NAME")
