"""benchmarks/first_light.sh, each part on a CPU at its smallest sizes, so that it is right on the day it is needed."""

import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch

from benchmarks import tables
from benchmarks.harness.cli import row_names
from benchmarks.harness.profiled import KINDS, OTHER, kind
from benchmarks.harness.slim import slim
from tests.support.processes import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks/first_light.sh"
# The first call, and the one with DALI: one part of each form, since the others differ in their names alone. The part
# versions is `fastsiam.doctor`, which has tests of its own.
PARTS = {"main": ("ceilings", "step50", "cifar"), "dali": ("dali_busy", "end_to_end", "loader")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo_folder, photos):
    """WORK with the data sets as a preparation leaves them, and OUT."""
    root = tmp_path_factory.mktemp("first_light")
    (root / "work/a").mkdir(parents=True)
    with tarfile.open(root / "work/a/cifar10.tar", "w") as tar:
        tar.add(demo_folder, arcname="cifar10")
    (root / "work/a/cifar10.name").write_text("cifar10.tar\n")
    with tarfile.open(root / "work/a/photographs.tar", "w") as tar:
        for path in sorted(photos.rglob("*.jpg")):
            tar.add(path, arcname=path.name)
    return root


def light(what, folders, only):
    environment = {
        **os.environ, "OUT": str(folders / "out"), "WORK": str(folders / "work"), "PYTHON": sys.executable,
        "TINY": "1", "DEVICE": "cpu", "PATIENCE": "20", "MINUTES": "60", "ONLY": " ".join(only),
        "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    done = subprocess.run(["bash", SCRIPT, what], env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.needs("dali")
@pytest.mark.parametrize("what", PARTS)
def test_parts_run_and_their_lines_go_into_tables(folders, what):
    """Without the compiler, which would take most of the time and is tested elsewhere."""
    printed = light(what, folders, (*PARTS[what], "cifar_files"))
    for name in PARTS[what]:
        assert f"\n{name}: rc 0" in printed, printed
    benchmarks = {"main": {"step"}, "dali": {"end_to_end", "loader"}}[what]
    results = folders / "work/results"
    assert benchmarks <= {path.stem for path in results.glob("*.jsonl")}
    for name in benchmarks:
        found = tables.read(results / f"{name}.jsonl")
        assert tables.render(tables.TABLES[name], found)
        # What is told at the end.
        assert f"\n{name} {found[0]['variant']}" in printed
    with tarfile.open(folders / "out/first_light.tgz") as tar:
        assert f"results/{sorted(benchmarks)[0]}.jsonl" in tar.getnames()
    if what == "main":
        ceilings = json.loads((results / "ceilings.json").read_text())
        assert ceilings.keys() == {"copy_bytes_per_second", "bf16_product_flops"}
        rows = {line["variant"] for line in tables.read(results / "step.jsonl")}
        assert rows == {"fastsiam", "+ one call"}
        assert "'kind': 'knn'" in printed
        assert len(list((folders / "work/profiles").glob("*.json"))) == 2


def test_no_time_begins_nothing_and_still_ends_well(folders):
    done = subprocess.run(
        ["bash", SCRIPT, "main"], capture_output=True, text=True, timeout=300, env={
            **os.environ, "OUT": str(folders / "none"), "WORK": str(folders / "none"), "PYTHON": sys.executable,
            "MINUTES": "0", "DEVICE": "cpu", "TINY": "1", "ONLY": "versions loss",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss: not begun, the time is over" in done.stdout


def test_what_an_image_with_torch_may_lack_is_packed():
    """The machine has no network: a requirement of fastsiam is in its image or among the wheels."""
    in_the_image = {"torch", "torchvision", "triton", "numba", "numpy", "pillow", "nvidia-ml-py"}
    # A run without them warns and goes on.
    optional = {"matplotlib", "tensorboard"}
    (listed,) = re.findall(r"install_requires=\[(.*?)\]", (REPOSITORY / "setup.py").read_text(), re.DOTALL)
    required = set(re.findall(r'^ *"([\w-]+)', listed, re.MULTILINE))
    wheels = re.search(r'-d "\$gpu/a/wheels" (.*?)\n +#', SCRIPT.read_text(), re.DOTALL)[1].split()
    assert "torch" in required
    assert required - in_the_image - optional <= set(wheels)


def test_every_row_that_is_asked_for_on_a_gpu_is_there():
    """On a CPU other rows are asked for."""
    from benchmarks.variants.step import ablation

    asked = set()
    for quoted in re.findall(r"rows r\w+ \$B\d+ [\d.]+ (?:'([^']+)'|\"([^\"]+)\"|(\w+))", SCRIPT.read_text()):
        asked |= {name.replace("$eager", "+ fused loss") for name in row_names("".join(quoted))}
    assert {"compile, two calls", "compile with CUDA graphs", "fastsiam", "authors"} <= asked
    assert asked <= {*ablation(torch.device("cuda"), torch.bfloat16), "fastsiam"}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution or product"),
        ("triton_red_fused__native_batch_norm_legit_functional_3", "triton reduction"),
        ("triton_poi_fused_cat_7", "triton copy or cat"),
        ("_views_kernel", "augment or crop"),
        ("_forward_kernel", "loss"),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimizer"),
        ("Memset (Device)", "copy, fill"),
        ("something_else", OTHER),
    ],
)
def test_the_kind_of_a_kernel(kernel, expected):
    assert kind(kernel) == expected
    assert expected in {*KINDS, OTHER}


def fat_binary(entries):
    body = b""
    for code, chip, payload in entries:
        header = bytearray(64)
        header[0:2], header[4:8] = code.to_bytes(2, "little"), (64).to_bytes(4, "little")
        header[8:16], header[28:32] = len(payload).to_bytes(8, "little"), chip.to_bytes(4, "little")
        body += bytes(header) + payload
    head = (0xBA55ED50).to_bytes(4, "little") + (1).to_bytes(2, "little") + (16).to_bytes(2, "little")
    return head + len(body).to_bytes(8, "little") + body


def test_code_of_other_chips_is_blanked_and_all_else_stays():
    """An ELF file of three sections: none, the fat binaries (the second after padding), the sections' names."""
    generator = np.random.default_rng(0)
    code = [generator.integers(1, 256, 40, np.uint8).tobytes() for _ in range(4)]
    first = fat_binary([(2, 80, code[0]), (2, 90, code[1]), (1, 90, code[2])])
    fat = first + bytes(-len(first) % 8 + 8) + fat_binary([(2, 90, code[3])])
    names = b"\0.nv_fatbin\0.shstrtab\0"
    table = 64 + len(fat) + len(names)
    head = bytearray(64)
    head[:4], head[0x28:0x30] = b"\x7fELF", table.to_bytes(8, "little")
    for at, value in ((0x3A, 64), (0x3C, 3), (0x3E, 2)):
        head[at : at + 2] = value.to_bytes(2, "little")
    sections = b""
    for name, at, length in ((0, 0, 0), (1, 64, len(fat)), (12, 64 + len(fat), len(names))):
        section = bytearray(64)
        section[:4] = name.to_bytes(4, "little")
        section[24:32], section[32:40] = at.to_bytes(8, "little"), length.to_bytes(8, "little")
        sections += section
    whole = bytes(head) + fat + names + sections
    data = bytearray(whole)
    assert slim(data) == 80
    expected = whole.replace(code[0], bytes(40)).replace(code[2], bytes(40))
    assert bytes(data) == expected
    assert slim(bytearray(b"#!/bin/sh")) == 0
