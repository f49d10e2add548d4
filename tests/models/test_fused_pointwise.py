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

# Channels of the images, and the stride.
SHORTCUTS = {"identity": (16, 1), "downsampling": (8, 1), "downsampling by 2": (8, 2)}
CHAIN = "a network of the three"


def narrow_block(shortcut):
    """torchvision's, of 4 channels inside and 16 outside."""
    channels, stride = SHORTCUTS[shortcut]
    down = None
    if shortcut != "identity":
        down = nn.Sequential(nn.Conv2d(channels, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    return resnet.Bottleneck(channels, 4, stride, down)


def chain():
    """One block after the other, each of which begins the next one's work, in two stages behind a stem."""
    network = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
    network.conv1, network.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
    network.layer1 = nn.Sequential(narrow_block("downsampling"), narrow_block("identity"))
    down = nn.Sequential(nn.Conv2d(16, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    network.layer2 = nn.Sequential(resnet.Bottleneck(16, 4, 2, down))
    network.layer3, network.layer4, network.fc = nn.Sequential(), nn.Sequential(), nn.Identity()
    return network


def bottleneck(shortcut, views=2, world_size=1):
    """A block, or the chain of them, in fp64."""
    torch.manual_seed(0)
    block = chain() if shortcut == CHAIN else narrow_block(shortcut)
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    block = block.double().to(DEVICE, memory_format=torch.channels_last)
    return split_statistics(block, views, world_size)


def fused(network):
    return fuse_pointwise(fuse_residual_blocks(copy.deepcopy(network)), "a network")


def images_of(shortcut, batch=6):
    channels, size = (3, 16) if shortcut == CHAIN else (SHORTCUTS[shortcut][0], 6)
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).double()
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last)


def calls_of(monkeypatch):
    calls, join = [], pointwise.join_op
    monkeypatch.setattr(pointwise, "join_op", lambda *arguments: calls.append(arguments) or join(*arguments))
    return calls


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("shortcut", [*SHORTCUTS, CHAIN])
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
    blocks = [module for module in mine.modules() if isinstance(module, residual._Fused)]
    assert len(calls) == 2 * len(blocks)
    # The following block is not a part of a block, and that of a copy is the copy's.
    assert [list(module.state_dict()) for module in (mine, copy.deepcopy(mine))] == [list(plain.state_dict())] * 2
    assert all(block.bn3.num_batches_tracked == 2 * views for block in blocks)
    copied = [module for module in copy.deepcopy(mine).modules() if isinstance(module, residual._Fused)]
    assert [block.following for block in copied] == [(after,) for after in copied[1:]] + [()]


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
    plain = bottleneck(CHAIN)
    mine, x = fused(plain), images_of(CHAIN)
    expected = step(plain, x)
    take_kernels(monkeypatch)
    call = torch.compile(mine, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert_same(step(mine, x, call), expected)


def test_recomputed_blocks_move_their_statistics_once(monkeypatch):
    plain = bottleneck(CHAIN)
    mine, x = recompute_activations(fused(plain), "a network"), images_of(CHAIN)
    expected = step(plain, x)
    take_kernels(monkeypatch)
    assert_same(step(mine, x), expected)


def test_a_block_with_frozen_statistics_takes_up_what_the_one_before_has_begun(monkeypatch):
    plain = bottleneck(CHAIN)
    mine, x = fused(plain), images_of(CHAIN)
    for network in (plain, mine):
        network.layer1[1].bn2.eval()
    expected = step(plain, x)
    take_kernels(monkeypatch)
    calls = calls_of(monkeypatch)
    assert_same(step(mine, x), expected)
    assert len(calls) == 2


def of_one_rank():
    """Two steps by the kernels on this rank's half of each view."""
    with pytest.MonkeyPatch.context() as patch:
        take_kernels(patch)
        calls = calls_of(patch)
        x = shard(images_of(CHAIN, 8), 2).contiguous(memory_format=torch.channels_last)
        found = two_steps(fused(bottleneck(CHAIN, 2, 2)), x, 1.0)
        assert len(calls) == 6
        return found


@pytest.mark.slow
def test_two_ranks_are_one(ranks):
    expected = two_steps(bottleneck(CHAIN), images_of(CHAIN, 8), 1.0)
    found = ranks(2, of_one_rank)
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
