"""Convolutions by matrix products against float64 and against torch's own in bf16; the rule that chooses them."""

import copy

import pytest
import torch
from torch import nn

from fastsiam.methods import build_method
from fastsiam.models import convolution
from fastsiam.models.convolution import Products, choose, use_products
from tests.support.numerics import assert_as_exact_as_plain
from tests.support.steps import build_step, views_of_step

ALL = Products(True, True, True)
# Channels in and out, kernel, stride, padding, height, width, bias.
LAYERS = {
    "1x1": (24, 16, 1, 1, 0, 5, 7, False),
    "1x1, wider": (8, 32, 1, 1, 0, 4, 4, True),
    "1x1, stride": (16, 24, 1, 2, 0, 7, 8, False),
    "3x3": (16, 24, 3, 1, 1, 4, 4, False),
    "3x3, odd, bias": (8, 16, 3, 1, 1, 7, 5, True),
    "3x3, stride": (16, 8, 3, 2, 1, 8, 8, False),
    "3x3, stride, odd": (16, 8, 3, 2, 1, 7, 9, True),
    "3x3, no padding": (8, 8, 3, 1, 0, 6, 5, False),
    "7x7, stride": (3, 8, 7, 2, 3, 16, 15, False),
    "2x3, strides": (8, 16, (2, 3), (3, 2), (0, 1), 9, 8, True),
    "one pixel": (8, 16, 3, 1, 1, 1, 1, False),
    "stride beyond the kernel": (8, 16, 2, 3, 0, 9, 8, False),
}


def layer(name):
    inputs, outputs, kernel, stride, padding, height, width, bias = LAYERS[name]
    torch.manual_seed(0)
    plain = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias).to(memory_format=torch.channels_last)
    for parameter in plain.parameters():
        # Weights that bf16 holds, so that float64 has the same ones.
        parameter.data = parameter.data.bfloat16().float()
    return plain, images(4, inputs, height, width)


def images(*shape):
    return torch.randn(*shape).bfloat16().contiguous(memory_format=torch.channels_last)


def with_tiles(monkeypatch, products=None):
    """The machine as one with AMX; `products`: of every layer."""
    monkeypatch.setattr(convolution, "multiplies_tiles", lambda: True)
    if products is not None:
        monkeypatch.setattr(convolution, "choose", lambda *_: products)


def step(network, x, call=None):
    """Output, and the gradients of images and parameters, under autocast where x is in bf16."""
    x = x.clone().requires_grad_()
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = (call or network)(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    y.backward(weights)
    return [y.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("at_a_time", [1 << 31, 1], ids=["whole", "image by image"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_as_exact_as_torchs(name, at_a_time, monkeypatch):
    plain, x = layer(name)
    with_tiles(monkeypatch, ALL)
    monkeypatch.setattr(convolution, "_COLUMNS", at_a_time)
    ours = use_products(copy.deepcopy(plain))
    calls = count_calls(monkeypatch)
    found = step(ours, x)
    assert calls == {"convolved": 1, "gradient_of_input": 1, "gradient_of_weight": 1}
    theirs, exact = step(plain, x), step(copy.deepcopy(plain).double(), x.double())
    assert_as_exact_as_plain(found[:2], exact[:2], theirs[:2], torch.bfloat16)
    # Gradients of parameters are fp32, whose last bits bf16 does not have.
    for mine, truth, reference in zip(found[2:], exact[2:], theirs[2:], strict=True):
        assert mine.dtype == torch.float32
        ulp = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (reference - truth).abs().max() + ulp
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1].is_contiguous(memory_format=torch.channels_last)


def count_calls(monkeypatch):
    calls = {}

    def counted(name, function):
        def call(*arguments):
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments)

        return call

    for name in ("convolved", "gradient_of_input", "gradient_of_weight"):
        monkeypatch.setattr(convolution, name, counted(name, getattr(convolution, name)))
    return calls


@pytest.mark.parametrize("which", range(3), ids=Products._fields)
def test_each_of_the_three_is_chosen_alone(which, monkeypatch):
    plain, x = layer("3x3, stride, odd")
    with_tiles(monkeypatch, Products(*(place == which for place in range(3))))
    calls = count_calls(monkeypatch)
    found, theirs = step(use_products(copy.deepcopy(plain)), x), step(plain, x)
    assert calls == {("convolved", "gradient_of_input", "gradient_of_weight")[which]: 1}
    torch.testing.assert_close(found, theirs, atol=0.05, rtol=0.02)
    others = [place for place in range(3) if place != which]
    assert all(torch.equal(found[place], theirs[place]) for place in others)


def test_a_sum_over_parts_is_not_rounded_to_bf16(monkeypatch):
    """512 images of gradient 1, an image at a time: a sum in bf16 would stay at 256."""
    monkeypatch.setattr(convolution, "_COLUMNS", 1)
    x = torch.ones(512, 8, 1, 1).bfloat16()
    found = convolution.gradient_of_weight(x, x, (3, 3), (1, 1), (1, 1))
    assert found.dtype == torch.float32
    assert (found[:, :, 1, 1] == 512).all()


def test_the_rule_takes_what_is_slow():
    """ResNet-18 at 32 px, ResNet-50 at 224 px: channels, kernel, stride and the pixels that come out."""
    chosen = {
        shape: "".join(letter for letter, taken in zip("fxw", _of(*shape), strict=True) if taken)
        for shape in [
            (3, 64, 3, 1, 32), (64, 64, 3, 1, 32), (128, 128, 3, 1, 16), (256, 256, 3, 1, 8), (512, 512, 3, 1, 4),
            (128, 256, 3, 2, 8), (256, 512, 3, 2, 4), (64, 128, 1, 2, 16), (256, 512, 1, 2, 4),
            (3, 64, 7, 2, 112), (64, 256, 1, 1, 56), (256, 128, 1, 1, 56), (1024, 256, 1, 1, 14),
            (2048, 512, 1, 1, 7), (512, 512, 3, 2, 7), (512, 512, 3, 1, 7), (1024, 2048, 1, 2, 7),
        ]
    }  # fmt: skip
    assert list(chosen.values()) == [
        "", "", "", "w", "fxw", "w", "fxw", "x", "fxw", "", "", "fx", "fx", "fxw", "fxw", "w", "fxw",
    ]  # fmt: skip


def _of(inputs, outputs, kernel, stride, pixels):
    return choose(inputs, outputs, (kernel, kernel), (stride, stride), [pixels, pixels])


def test_only_plain_convolutions_change(monkeypatch):
    with_tiles(monkeypatch, ALL)

    class Other(nn.Conv2d):
        pass

    kept = [
        Other(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 8, 3),
    ]  # fmt: skip
    kinds = [type(one) for one in kept]
    network = nn.Sequential(*kept, nn.Conv2d(8, 16, 3, bias=True))
    before = copy.deepcopy(network)
    use_products(network)
    assert [type(one) for one in kept] == kinds
    assert type(network[-1]) is not nn.Conv2d
    assert str(network) == str(before)
    assert type(network[-1]).__qualname__ == "Conv2d"
    network.load_state_dict(before.state_dict())


def test_in_evaluation_and_other_precision_it_is_torchs(monkeypatch):
    plain, x = layer("3x3")
    with_tiles(monkeypatch, ALL)
    ours = use_products(copy.deepcopy(plain))
    calls = count_calls(monkeypatch)
    for found, expected in zip(step(ours, x.float()), step(plain, x.float()), strict=True):
        assert torch.equal(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(ours(x), plain(x))
        assert torch.equal(ours(x.contiguous()), plain(x.contiguous()))
        assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert calls == {}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, True), ("ALL", True), ("avx512_core_amx", True), ("AVX512_CORE_BF16", False), ("AVX2", False)],
)
def test_a_limit_on_onednn_counts(limit, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert convolution.multiplies_tiles() == (expected and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("tiles", [False, True])
def test_only_a_step_on_a_cpu_with_tiles_changes_layers(tiles, monkeypatch, tiny_config):
    """A method as it is built is that of a GPU too."""
    monkeypatch.setattr(convolution, "multiplies_tiles", lambda: tiles)

    def plain(method):
        return {type(module) is nn.Conv2d for module in method.modules() if isinstance(module, nn.Conv2d)}

    assert plain(build_method(tiny_config())) == {True}
    assert plain(build_step(tiny_config(), torch.bfloat16).method) == {not tiles}


def test_a_step_compiles_to_one_graph(monkeypatch):
    torch._dynamo.reset()
    with_tiles(monkeypatch, ALL)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 8, 1, 2)
    ).to(memory_format=torch.channels_last)
    use_products(network)
    x = images(4, 8, 9, 8)
    expected = step(network, x)
    found = step(network, x, torch.compile(network, fullgraph=True, backend="aot_eager"))
    for mine, reference in zip(found, expected, strict=True):
        assert (mine - reference).abs().max() <= 0.02 * reference.abs().max()


@pytest.mark.parametrize("more", [(), ("train.micro_batch=4",), ("train.checkpoint_activations=true",)], ids=str)
def test_a_step_trains_by_products(more, monkeypatch, tiny_config):
    """Loss and gradients are those of torch's convolutions, to bf16."""
    config = tiny_config("train.batch_size=12", *more)
    losses, gradients = [], []
    for tiles in (False, True):
        monkeypatch.setattr(convolution, "multiplies_tiles", lambda tiles=tiles: tiles)
        monkeypatch.setattr(convolution, "choose", lambda *_: ALL)
        calls = count_calls(monkeypatch)
        step = build_step(config, torch.bfloat16)
        step.method.to(memory_format=torch.channels_last)
        losses.append(step(views_of_step(1, 12, dtype=torch.bfloat16), 1)["loss"].item())
        gradients.append({name: one.grad for name, one in step.method.named_parameters() if "conv" in name})
    layers = sum(isinstance(module, nn.Conv2d) for module in step.method.encoder.modules())
    assert calls["gradient_of_weight"] == layers * step.micro_batches
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    for name, expected in gradients[0].items():
        # Batch norm over few values enlarges bf16's errors.
        assert (gradients[1][name] - expected).norm() <= 0.1 * expected.norm(), name
