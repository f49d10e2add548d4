"""What only a CUDA device can show; pytest -m gpu runs these."""

import contextlib
import copy
import dataclasses
import itertools
import time
from collections import deque

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastsiam
from fastsiam.config import load_config
from fastsiam.data.augment import augment
from fastsiam.data.backends.choose import dali_installed
from fastsiam.data.rng import augment_draws
from fastsiam.doctor import facts
from fastsiam.doctor import software as checks
from fastsiam.kernels import batch_norm, crop_resize, negative_cosine, pool
from fastsiam.methods import build_method
from fastsiam.models.batch_norm import split_statistics
from fastsiam.runtime.device import choose_precision
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.train import opened
from tests.support.gpu_record import DECODER
from tests.support.images import pictures
from tests.support.loaders import LEVELS, RECIPE, SPEC, make
from tests.support.runs import lines

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("resident_cache")]
BACKENDS = ("dali", "pil", "resident") if dali_installed() else ("pil", "resident")


@contextlib.contextmanager
def no_waiting():
    """CUDA raises at every operation that synchronises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(call):
    """Names of the kernels that a call launches, sorted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sorted(event.name for event in profiler.events() if "kernel" in event.name)


def crops(photos, backend, device):
    """The crops of an epoch, and the backend in words."""
    made = make(photos, backend, device=device)
    found = [crops.clone() for _, (crops,) in made.backend.crops(made._requests(0, 0, deque()))]
    return found, made.backend.description


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_are_on_the_device_and_those_of_the_cpu(photos, backend, record_property):
    """nvJPEG and libjpeg differ in rounding and chroma upsampling."""
    ours, description = crops(photos, backend, "cuda")
    record_property(DECODER, description)
    for here, there in zip(ours, crops(photos, "pil", "cpu")[0], strict=True):
        assert here.is_cuda
        assert (here.cpu().float() - there.float()).abs().mean() < 1.0


def test_dalis_own_augmentation_on_the_device_is_that_of_the_cpu(photos):
    """Fails where DALI is not installed: no commit is verified without it."""
    spec = dataclasses.replace(LEVELS, size=24, solarize=0.4)
    ours, theirs = (make(photos, RECIPE, spec=spec, batch_size=8, device=device) for device in ("cuda", "cpu"))
    for here, expected in zip(ours.epoch(0), theirs.epoch(0), strict=True):
        assert here.views[0].is_cuda
        assert (here.views[0].cpu() - expected.views[0]).abs().mean() < 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiled_in_bf16_follows_eager_fp32(tiny, tmp_path, backend):
    losses = []
    for precision, compiled in (("fp32", "off"), ("auto", "auto")):
        overrides = tiny(
            "train.device=cuda", f"train.precision={precision}", f"train.compile={compiled}", f"data.backend={backend}",
            "data.store_size=48", f"run.name={precision}", "train.max_steps=4", "data.workers=2", "data.val=null",
        )  # fmt: skip
        fastsiam.pretrain(load_config("quickstart", overrides))
        losses.append([line["loss"] for line in lines(tmp_path / "runs" / precision) if line["kind"] == "train"])
    assert len(losses[1]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "auto"), ("lars", "auto"), ("sgd", "fp16")])
def test_a_step_does_not_wait_for_the_device(tiny, optimizer, precision):
    overrides = tiny(
        f"optimizer.name={optimizer}", f"train.precision={precision}", "train.device=cuda", "train.compile=off",
        "data.backend=synthetic",
    )  # fmt: skip
    with opened(load_config("quickstart", overrides)) as (parts, _):
        views = next(parts.data.loader.epoch(0)).views
        parts.step(views, 1)
        with no_waiting():
            for number in range(2, 5):
                parts.step(views, number)


def test_statistics_across_ranks_are_one_graph_over_nccl():
    """A group of one rank: its statistics are the plain layer's."""
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        torch.manual_seed(0)
        plain = split_statistics(nn.BatchNorm2d(16), 2).cuda()
        across = copy.deepcopy(plain)
        x = torch.randn(8, 16, 6, 6, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
        compiled = torch.compile(lambda x: across._across_ranks(x.unflatten(0, (2, -1))).flatten(0, 1), fullgraph=True)
        weight = torch.randn_like(x)
        gradients = [torch.autograd.grad((layer(x) * weight).sum(), x) for layer in (plain, compiled)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(across.running_var, plain.running_var)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("compiles", [False, True])
def test_fused_batch_norms_train_as_the_librarys(monkeypatch, compiles):
    """Gradients of a ResNet-18 in fp64, with its stem's max pool; the library's forward takes what no kernel takes."""
    config = load_config("quickstart", ["model.encoder=resnet18", "model.stem=imagenet", "data.backend=synthetic"])
    torch.manual_seed(0)
    method = build_method(config).cuda().double().to(memory_format=torch.channels_last)
    views = torch.randn(8, 3, 64, 64, device="cuda", dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for takes in (batch_norm.takes, lambda x: False):
        for module in (batch_norm, pool):
            monkeypatch.setattr(module, "takes", takes)
        mine = copy.deepcopy(method)
        call = torch.compile(mine, fullgraph=True) if compiles and not found else mine
        call([views])["loss"].backward()
        gradients = {name: parameter.grad for name, parameter in mine.named_parameters()}
        found.append((gradients, dict(mine.named_buffers())))
    (fused, buffers), (plain, expected) = found
    torch.testing.assert_close(buffers, expected, atol=1e-9, rtol=1e-9)
    for name, reference in plain.items():
        assert (fused[name] - reference).abs().max() <= 1e-7 * reference.abs().max() + 1e-12, name


@pytest.mark.parametrize("compiles", [False, True])
def test_bottlenecks_without_the_sides_of_their_last_convolution_train_as_exactly(compiles):
    """A ResNet-50 in bf16: the gradients' distance from fp32, summed over its layers, beside batch norm's kernels."""
    options = ["model.encoder=resnet50", "model.stem=imagenet", "model.width=null", "data.backend=synthetic"]
    views = torch.randn(32, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    found = []
    for fused, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)):
        torch.manual_seed(0)
        method = build_method(load_config("quickstart", [*options, f"model.fused_pointwise={str(fused).lower()}"]))
        method = method.cuda().to(memory_format=torch.channels_last)
        call = torch.compile(method, fullgraph=True) if compiles and fused else method
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = call([views])["loss"]
        loss.backward()
        found.append([parameter.grad for parameter in method.encoder.parameters()])
    mine, plain, exact = found
    errors = [sum(((a - b).norm() / b.norm()).item() for a, b in zip(one, exact, strict=True)) for one in (mine, plain)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("color", ["matrix", "exact"])
def test_augmenting_does_not_wait_for_the_device(color):
    spec = dataclasses.replace(SPEC, color=color, solarize=0.5)
    crops = torch.randint(0, 256, (32, SPEC.size, SPEC.size, 3), dtype=torch.uint8)
    drawn = augment_draws(spec, 0, 0, np.arange(32), 0)
    on_device = crops.cuda()
    augment(on_device, drawn, spec, torch.float32)
    with no_waiting():
        views = augment(on_device, drawn, spec, torch.float32)
    torch.testing.assert_close(views.cpu(), augment(crops, drawn, spec, torch.float32), rtol=1e-4, atol=1e-4)


def four(count=512, dim=2048, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = [torch.randn(count, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return [x.requires_grad_() for x in draw[:2]] + draw[2:]


def test_the_loss_on_the_device_is_one_kernel_each_way_and_does_not_wait():
    inputs = four()

    def both_ways():
        torch.autograd.grad(negative_cosine(*inputs), inputs[:2])

    both_ways()
    with no_waiting():
        both_ways()
    ours = [name for name in kernels_of(both_ways) if name in ("_forward_kernel", "_backward_kernel")]
    assert ours == ["_backward_kernel", "_forward_kernel"]


def test_the_loss_replays_in_a_cuda_graph():
    inputs = four()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(negative_cosine(*inputs), inputs[:2])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = negative_cosine(*inputs)
        gradients = torch.autograd.grad(loss, inputs[:2])
    for seed in (1, 2, 3):
        fresh = four(seed=seed)
        with torch.no_grad():
            for x, new in zip(inputs, fresh, strict=True):
                x.copy_(new)
        graph.replay()
        expected = negative_cosine(*fresh)
        assert torch.equal(loss, expected)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, fresh[:2]), strict=True):
            assert torch.equal(ours, theirs)


def test_views_on_the_device_take_two_launches():
    spec = dataclasses.replace(SPEC, color="matrix", blur=0.5)
    drawn = augment_draws(spec, 0, 0, np.arange(32), 0)
    crops = torch.randint(0, 256, (32, SPEC.size, SPEC.size, 3), dtype=torch.uint8, device="cuda")
    augment(crops, drawn, spec, torch.bfloat16)
    assert kernels_of(lambda: augment(crops, drawn, spec, torch.bfloat16)) == ["_contrast_kernel", "_views_kernel"]


def some_boxes(count=64):
    """Of 50 x 40 px images: from a hundredth of the area to all of it, at fractions of pixels."""
    generator = torch.Generator().manual_seed(0)
    length = (0.1 + 0.9 * torch.rand(count, 2, generator=generator)) * torch.tensor([50, 40])
    begin = torch.rand(count, 2, generator=generator) * (torch.tensor([50, 40]) - length)
    return torch.cat([begin, length], 1), torch.randint(0, 8, (count,), generator=generator)


@pytest.mark.parametrize("size", [7, 32, 96])
def test_crops_out_of_a_store_are_those_of_the_cpu(size):
    images, (boxes, indices) = pictures(8, 50, 40), some_boxes()
    here, there = crop_resize(images.cuda(), boxes, size, indices), crop_resize(images, boxes, size, indices)
    difference = (here.cpu().int() - there.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01
    assert torch.equal(here, crop_resize(images.cuda(), boxes.cuda(), size, indices.cuda()))


def test_cropping_out_of_a_store_is_one_launch_and_does_not_wait_for_the_device():
    images, (boxes, indices) = pictures(8, 50, 40).cuda(), some_boxes()
    crop_resize(images, boxes, 32, indices)
    with no_waiting():
        crop_resize(images, boxes, 32, indices)
    assert kernels_of(lambda: crop_resize(images, boxes, 32, indices)) == ["_crop_kernel"]


def test_auto_precision_is_bf16_where_the_gpu_multiplies_it():
    native = torch.cuda.get_device_capability()[0] >= 8
    assert choose_precision("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)


def test_energy_rises_while_the_device_works():
    import pynvml

    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    with EnergyMeter.of(device, pytest.fail) as meter:
        assert meter.description.startswith("NVML"), meter.description
        began, readings = time.perf_counter(), [meter.joules()]
        for _ in range(4):
            until = time.perf_counter() + 1
            while time.perf_counter() < until:
                x @ x
                torch.cuda.synchronize()
            readings.append(meter.joules())
        seconds = time.perf_counter() - began
    assert all(earlier < later for earlier, later in itertools.pairwise(readings))
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    limit = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
    assert 10 < meter.joules() / seconds < 1.2 * limit


def test_reading_the_energy_does_not_wait_for_the_device():
    with EnergyMeter.of(torch.device("cuda")) as meter, no_waiting():
        assert meter.joules() >= 0


def test_the_doctor_finds_the_device():
    torch_says, nvml_says = facts.ask("torch"), facts.ask("nvml")
    assert torch_says.reason == nvml_says.reason == ""
    found = torch_says.found["gpus"][torch.cuda.current_device()]
    assert found["name"] == torch.cuda.get_device_name()
    assert tuple(found["capability"]) == torch.cuda.get_device_capability()
    assert found["error"] is None
    assert 0 < found["free"] <= found["memory"]
    assert found["name"] in nvml_says.found["gpus"]
    judged = [
        checks.check_driver(nvml_says, torch.version.cuda),
        *checks.check_gpus(torch_says, nvml_says, None),
        checks.check_triton(facts.ask("triton"), None, gpu=True),
        checks.check_c_compiler(facts.c_compiler(), facts.has_python_headers(), gpu=True),
    ]
    assert [line for line in judged if line.status == "error"] == []
