"""Fused residual networks against the libraries' own, under Triton's interpreter or on a GPU."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from fastsiam.kernels import norm_rows_numba
from fastsiam.methods import build_method
from fastsiam.models import batch_norm, fused_norm, residual
from fastsiam.models.batch_norm import gains_by_view, split_statistics
from fastsiam.models.encoder import build_encoder
from fastsiam.models.recompute import recompute_activations
from fastsiam.models.residual import fuse_residual_blocks
from tests.support.kernels_on_cpu import as_on_cuda, take_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu

# Encoders of small images with a few channels: every form of a block that is fused. Names are those of the libraries.
NETWORKS = {
    "cifar": lambda: build_encoder("cifar_resnet8", "cifar", 8, False),
    "bottlenecks": lambda: narrow("resnet50", "Bottleneck"),
    "basic, with its pool": lambda: narrow("resnet18", "BasicBlock"),
    "timm": lambda: timm_network(),
    "timm, resnet-d": lambda: timm_network(avg_down=True, stem_type="deep", stem_width=4),
}


def narrow(name, block):
    """torchvision's with 4, 8, 12 and 16 channels a stage in place of 64 to 512, two blocks each."""
    from torchvision.models import resnet

    network = resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1])
    network.inplanes, network.fc = 64, nn.Identity()
    network.layer1 = network._make_layer(getattr(resnet, block), 4, 2)
    network.layer2 = network._make_layer(getattr(resnet, block), 8, 2, stride=2)
    network.layer3 = network._make_layer(getattr(resnet, block), 12, 1, stride=2)
    network.layer4 = network._make_layer(getattr(resnet, block), 16, 1, stride=2)
    return network


def timm_network(**options):
    timm = pytest.importorskip("timm")
    return timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, [2, 1, 1, 1], channels=(4, 8, 8, 8), num_classes=0, **options
    )


def split(name, seed=0):
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return split_statistics(network.double().to(DEVICE, memory_format=torch.channels_last), 2)


def images(size=16, batch=4, seed=0):
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE).contiguous(memory_format=torch.channels_last)


def step(network, x, call=None):
    """Features, gradients of weights and images, and buffers, after a forward and backward."""
    x = x.clone().requires_grad_()
    out = (network if call is None else call)(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE)
    (out * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return out.detach(), x.grad, gradients, dict(network.named_buffers())


def assert_same(found, expected):
    """Sums of some thousand terms in float64; a batch norm over two values, as the last ones are, enlarges errors."""
    torch.testing.assert_close(found[0], expected[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found[3], expected[3], atol=1e-11, rtol=1e-10)
    for mine, reference in zip((found[1], *found[2].values()), (expected[1], *expected[2].values()), strict=True):
        assert (mine - reference).abs().max() <= 1e-9 * max(reference.abs().max(), 1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_librarys(name, monkeypatch):
    plain = split(name)
    fused = fuse_residual_blocks(copy.deepcopy(plain))
    expected = step(plain, images())
    blocks = [module for module in fused.modules() if isinstance(module, residual._Fused)]
    assert len(blocks) == {"cifar": 3, "bottlenecks": 6, "basic, with its pool": 6}.get(name, 5)
    # All but the last give their result to two users.
    assert [block.forks for block in blocks] == [True] * (len(blocks) - 1) + [False]
    take_kernels(monkeypatch)
    calls = count_launches(monkeypatch)
    found = step(fused, images())
    assert_same(found, expected)
    assert list(found[2]) == list(expected[2])
    # Each norm has its statistics; a join with a downsampling shortcut is one launch for two norms. Those before a
    # convolution of their block are applied once more in the backward pass.
    norms = [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    joined = sum(isinstance(block.downsample, nn.Sequential) for block in blocks)
    inner = sum(len(residual._layers(block)) - 1 for block in blocks)
    assert calls == {
        "statistics_op": len(norms), "apply_op": len(norms) - joined, "apply_again_op": inner,
        "reduce_op": len(norms) - joined, "apply_backward_op": len(norms) - joined,
    }  # fmt: skip


def count_launches(monkeypatch):
    calls = {}

    def counted(name):
        op = getattr(fused_norm.kernels, name)

        def call(*arguments):
            calls[name] = calls.get(name, 0) + 1
            return op(*arguments)

        return call

    for name in ("statistics_op", "apply_op", "apply_again_op", "reduce_op", "apply_backward_op"):
        monkeypatch.setattr(fused_norm.kernels, name, counted(name))
    return calls


@pytest.mark.parametrize("name", NETWORKS)
def test_elsewhere_nothing_changes(name, monkeypatch):
    """Without the kernels, in evaluation, and for other layouts it is the library's forward; a state dict fits both."""
    plain = split(name)
    fused = fuse_residual_blocks(copy.deepcopy(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    if DEVICE == "cpu":
        assert_same(step(fused, images()), step(plain, images()))
        take_kernels(monkeypatch)
    with torch.no_grad():
        assert torch.equal(fused.eval()(images()), plain.eval()(images()))
    fused, plain = (network.train().to(memory_format=torch.contiguous_format) for network in (fused, plain))
    x = images().contiguous()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), atol=1e-12, rtol=1e-12)


def test_a_step_compiles_to_one_graph(monkeypatch):
    torch._dynamo.reset()
    plain = split("cifar")
    fused = fuse_residual_blocks(copy.deepcopy(plain))
    expected = step(plain, images())
    take_kernels(monkeypatch)
    call = torch.compile(fused, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert_same(step(fused, images(), call), expected)


def test_recomputed_blocks_are_fused_and_move_their_statistics_once(monkeypatch):
    plain = split("cifar")
    fused = recompute_activations(fuse_residual_blocks(copy.deepcopy(plain)), "cifar_resnet8")
    expected = step(plain, images())
    take_kernels(monkeypatch)
    assert_same(step(fused, images()), expected)


def test_blocks_with_something_else_in_between_stay():
    timm = pytest.importorskip("timm")
    stays = [
        timm.create_model("seresnet18", pretrained=False, num_classes=0),
        timm.create_model("resnet18", pretrained=False, num_classes=0, act_layer=nn.SiLU),
        timm.create_model("resnet18", pretrained=False, num_classes=0, drop_path_rate=0.2),
        build_encoder("resnet18", "imagenet", None, False),
    ]
    for network in stays[:-1]:
        split_statistics(network, 2)
    kinds = [[type(module) for module in network.modules() if hasattr(module, "conv2")] for network in stays]
    for network in stays:
        fuse_residual_blocks(network)
    found = [[type(module) for module in network.modules() if hasattr(module, "conv2")] for network in stays]
    # Stochastic depth begins at the second block; the last has no per-view batch norms.
    assert sum(issubclass(kind, residual._Fused) for kind in found.pop(2)) == 1
    kinds.pop(2)
    assert found == kinds


def test_a_block_wider_than_the_kernels_of_a_cpu_trains_by_the_librarys_batch_norm():
    """As ResNeXt-101 32x32d has them."""
    wide = 2 * norm_rows_numba.MOST_CHANNELS
    torch.manual_seed(0)
    block = Bottleneck(64, 16, groups=wide, base_width=4).to(torch.bfloat16, memory_format=torch.channels_last)
    assert block.conv2.out_channels == wide
    plain = split_statistics(nn.Sequential(block), 2)
    fused = fuse_residual_blocks(copy.deepcopy(plain))
    assert isinstance(fused[0], residual._Fused)
    x = torch.randn(4, 64, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found, expected = (network(x) for network in (fused, plain))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_frozen_statistics_are_left_alone(monkeypatch):
    take_kernels(monkeypatch)
    fused = fuse_residual_blocks(split("cifar"))
    for layer in fused.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    before = copy.deepcopy(fused.state_dict())
    step(fused, images())
    torch.testing.assert_close(fused.state_dict(), before, atol=0, rtol=0)


def test_a_method_has_fused_encoders_and_goes_by_views_no_more(tiny_config, monkeypatch):
    """BYOL's target is a copy of the encoder."""
    method = build_method(tiny_config("method.name=byol"))
    encoders = [module for module in method.modules() if type(module).__name__ == "CifarResNet"]
    assert len(encoders) == 2
    for encoder in encoders:
        assert sum(isinstance(module, residual._Fused) for module in encoder.modules()) == 3
    x = as_on_cuda(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert not gains_by_view(encoders[0], x)
    assert gains_by_view(encoders[0], x.contiguous())
    for layer in encoders[0].modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    assert gains_by_view(encoders[0], x)


def test_the_module_is_moved_with_its_counters():
    layer = split_statistics(nn.BatchNorm2d(3), 2).to("meta")
    assert layer.counter.device.type == "meta"
    assert layer.double().counter.dtype == torch.int32
    assert batch_norm.split_statistics(nn.BatchNorm2d(3, affine=False), 2).counter is None
