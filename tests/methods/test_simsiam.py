"""The method of a config against the paper's Algorithm 1 and the layers it describes, and under torch.compile."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fastsiam.config import load_config
from fastsiam.methods import build_method
from fastsiam.models.batch_norm import PerViewBatchNorm1d
from fastsiam.models.encoder import build_encoder
from fastsiam.optim.build import build_optimizer, set_learning_rate
from tests.support.numerics import algorithm_1

GROUPS = "views=[{recipe: demo, size: 16, color: matrix}, {recipe: demo, size: 8, color: matrix, count: 3}]"


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name, *overrides):
    with torch.device("meta"):
        return build_method(load_config(name, overrides))


def views_of(images=8, size=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2 * images, 3, size, size, generator=generator, dtype=dtype)
    views[images:] = 0.5 * views[:images] + views[images:] + 0.3
    return views


def test_training_steps_are_algorithm_1s_on_plain_modules(tiny_config):
    config = tiny_config("optimizer.schedule=constant", "optimizer.warmup=0", "model.zero_init_residual=false")
    torch.manual_seed(0)
    method = build_method(config).double()
    plain = build_method(tiny_config("model.bn_statistics=joint", "model.zero_init_residual=false")).double()
    plain.load_state_dict(method.state_dict())
    f, h = nn.Sequential(plain.encoder, plain.projector), plain.predictor
    ours = build_optimizer(method, config)
    theirs = torch.optim.SGD(
        plain.parameters(),
        lr=config.optimizer.base_lr * 8 / 256,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )
    # Later steps see the running statistics and the momentum of the earlier ones.
    for step in range(3):
        views = views_of(seed=step, dtype=torch.float64)
        set_learning_rate(ours, config, 0.1 * step)
        ours.zero_grad()
        theirs.zero_grad()
        out = method([views])
        z1, z2 = (f(view) for view in views.chunk(2))
        expected = algorithm_1(h(z1), h(z2), z1, z2)
        assert out["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
        assert not out["z"].requires_grad
        out["loss"].backward()
        expected.backward()
        ours.step()
        theirs.step()
        method.after_step(out)
    torch.testing.assert_close(method.state_dict(), plain.state_dict(), atol=1e-10, rtol=1e-10)


def test_z_is_the_projection_of_both_views(tiny_config):
    method = build_method(tiny_config()).eval()
    views = views_of()
    z = method([views])["z"]
    torch.testing.assert_close(z, torch.cat([method.projector(method.encoder(view)) for view in views.chunk(2)]))
    assert (method.embed(views) == z).all()


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_stop_gradient_of_the_config_decides_what_the_projection_learns(tiny_config, stop_gradient):
    method = build_method(tiny_config(f"method.stop_gradient={str(stop_gradient).lower()}"))
    views = views_of()
    plain = deepcopy(method)
    z1, z2 = plain.embed(views).chunk(2)
    p1, p2 = plain.predictor(torch.cat((z1, z2))).chunk(2)
    algorithm_1(p1, p2, z1, z2, stop_gradient).backward()
    method([views])["loss"].backward()
    got, other = method.projector[0].weight.grad, plain.projector[0].weight.grad
    torch.testing.assert_close(got, other, atol=1e-6, rtol=1e-4)


def test_r50_has_the_papers_heads_and_their_parameter_counts():
    method = on_meta("r50_100ep")
    # torchvision's ResNet-50 (25,557,032) without its classifier (2048 * 1000 + 1000).
    assert count(method.encoder) == 23_508_032
    assert method.encoder.num_features == 2048
    # Three layers of 2048; BN with scale and shift behind the first two, without behind the last.
    assert count(method.projector) == 3 * 2048 * 2048 + 2 * 2 * 2048
    kinds = [nn.Linear, PerViewBatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in method.projector] == [*kinds, *kinds, nn.Linear, PerViewBatchNorm1d]
    assert [layer.affine for layer in method.projector[1::3]] == [True, True, False]
    # 2048 to 512 and back; BN and a missing bias only inside.
    assert count(method.predictor) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
    assert [type(layer) for layer in method.predictor] == [*kinds, nn.Linear]
    assert method.predictor[0].bias is None
    assert method.predictor[3].bias.shape == (2048,)


def test_r18_on_cifar_has_a_two_layer_projector_and_the_small_stem():
    method = on_meta("r18_cifar10_800ep")
    # torchvision's ResNet-18 (11,689,512) without its classifier, the 7x7 stem of 9,408 weights made 3x3.
    assert count(method.encoder) == 11_689_512 - 513_000 - 9_408 + 1_728
    assert count(method.projector) == 512 * 2048 + 2 * 2048 + 2048 * 2048
    assert count(method.predictor) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
    sides = []
    for layer in (method.encoder.conv1, method.encoder.layer1, method.encoder.layer4):
        layer.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    method.encoder(torch.empty(2, 3, 32, 32, device="meta"))
    # 32 px up to the first stage, then halved three times.
    assert sides == [32, 32, 4]


def test_cifar_resnet8_is_the_one_counted_by_hand():
    encoder = build_encoder("cifar_resnet8", "cifar", 16, False)
    stem = 3 * 16 * 9 + 2 * 16
    stages = (2 * 16 * 16 * 9 + 4 * 16, (16 + 32) * 32 * 9 + 4 * 32, (32 + 64) * 64 * 9 + 4 * 64)
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(encoder) == stem + sum(stages) + shortcuts == 77_392
    assert [block.conv2.out_channels for block in encoder.blocks] == [16, 32, 64]
    # He et al., section 4.2: 6n + 2 layers, here 20: stem, 18 convolutions in blocks, and the classifier left off.
    deeper = build_encoder("cifar_resnet20", "cifar", 16, False)
    assert sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in deeper.modules()) == 19
    sides = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    images = views_of(size=32)
    features = encoder(images)
    assert sides == [32, 16, 8]
    stem_output = torch.relu(encoder.bn1(encoder.conv1(images)))
    torch.testing.assert_close(features, encoder.blocks(stem_output).mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet8"])
def test_zero_init_residual_starts_the_last_norm_of_each_block_at_zero(name):
    own = name.startswith("cifar")
    for zero in (True, False):
        encoder = build_encoder(name, "cifar" if own else "imagenet", 16 if own else None, zero)
        blocks = [
            module
            for module in encoder.modules()
            if isinstance(module, torchvision.models.resnet.BasicBlock | torchvision.models.resnet.Bottleneck)
        ]
        assert len(blocks) == {"resnet18": 8, "resnet50": 16, "cifar_resnet8": 3}[name]
        last = [getattr(block, "bn3", block.bn2).weight for block in blocks]
        first = [block.bn1.weight for block in blocks]
        assert all((weight == (0 if zero else 1)).all() for weight in last)
        assert all((weight == 1).all() for weight in first)


@pytest.mark.parametrize(
    ("name", "stem", "width", "features"),
    [
        ("resnet18", "cifar", None, 512),
        ("resnet50", "imagenet", None, 2048),
        ("wide_resnet50_2", "imagenet", None, 2048),
        ("cifar_resnet8", "cifar", 16, 64),
        ("cifar_resnet20", "cifar", 32, 128),
    ],
)
def test_num_features_is_the_width_of_the_pooled_features(name, stem, width, features):
    with torch.device("meta"):
        encoder = build_encoder(name, stem, width, True)
        assert encoder(torch.empty(2, 3, 64, 64)).shape[1] == features
    assert encoder.num_features == features


def groups_of(seed, counts=((2, 16), (3, 8)), images=4):
    """Groups of views [V_g*N, 3, S, S] in fp64, each view with statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.cat(
            [(view + 1) * torch.randn(images, 3, size, size, generator=generator).double() for view in range(count)]
        )
        for count, size in counts
    ]


@pytest.mark.parametrize("statistics", ["per_view", "joint"])
def test_groups_of_two_sizes_are_one_call_per_view(tiny_config, statistics):
    """Loss, gradients and running statistics of the encoder called view by view, or group by group where joint."""
    torch.manual_seed(0)
    method = build_method(tiny_config(GROUPS, f"model.bn_statistics={statistics}")).double()
    plain = build_method(tiny_config("model.bn_statistics=joint")).double()
    plain.load_state_dict(method.state_dict())
    views = groups_of(0)
    calls = [*views[0].chunk(2), *views[1].chunk(3)] if statistics == "per_view" else views
    features = [plain.encoder(view) for view in calls]
    if statistics == "per_view":
        z = [plain.projector(part) for part in features]
        p = [plain.predictor(part) for part in z]
    else:
        projected = plain.projector(torch.cat(features))
        z, p = projected.chunk(5), plain.predictor(projected).chunk(5)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(-F.cosine_similarity(p[i], z[j].detach()).mean() for i, j in pairs) / len(pairs)
    out = method(views)
    assert out["z"].shape == (20, 16)
    assert out["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
    out["loss"].backward()
    expected.backward()
    for (name, one), (_, other) in zip(method.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-8, msg=name)
    torch.testing.assert_close(dict(method.named_buffers()), dict(plain.named_buffers()), atol=1e-12, rtol=1e-10)


def test_joint_statistics_are_of_all_views_of_a_size_wherever_their_groups_stand(tiny_config):
    group = "{{recipe: demo, color: matrix, size: {}, count: {}}}"
    groups = f"views=[{group.format(16, 2)}, {group.format(8, 3)}, {group.format(16, 1)}]"
    method = build_method(tiny_config(groups, "model.bn_statistics=joint")).double()
    views = groups_of(0, counts=((2, 16), (3, 8), (1, 16)))
    both, small = method.encoder(torch.cat([views[0], views[2]])), method.encoder(views[1])
    expected = torch.cat([both[:8], small, both[8:]])
    torch.testing.assert_close(method.encoded(views), expected, atol=1e-12, rtol=1e-10)


def losses_and_gradients(method, call, batches):
    losses = []
    for views in batches:
        method.zero_grad()
        loss = call(views)["loss"]
        loss.backward()
        losses.append(loss.item())
    return losses, {name: parameter.grad.clone() for name, parameter in method.named_parameters()}


@pytest.mark.parametrize("groups", [GROUPS, "views.count=2"])
def test_a_method_of_a_config_is_one_graph_that_is_compiled_once(tiny_config, groups):
    """The same losses, gradients and buffers as in eager mode."""
    batches = [groups_of(seed) if groups == GROUPS else [views_of(seed=seed).double()] for seed in range(3)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method = build_method(tiny_config(groups, "model.zero_init_residual=false")).double()
    eager = deepcopy(method)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
        losses, gradients = losses_and_gradients(method, compiled, batches)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    expected_losses, expected_gradients = losses_and_gradients(eager, eager, batches)
    assert losses == pytest.approx(expected_losses, abs=1e-9)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(dict(method.named_buffers()), dict(eager.named_buffers()), atol=1e-10, rtol=1e-8)
