"""The kernels compile for A100 and H200, with accesses 16 bytes wide and without spilling; needs no GPU."""

import json

import pytest

from fastsiam.kernels import augment_triton, pointwise
from tests.support.processes import run_python

pytestmark = pytest.mark.slow
WIDTHS = ("v4.b32", "v2.b32", "b32")
POINTWISE = ("gram", "rows_product", "join", "join_normed", "dgrad", "join_dgrad", "join_dgrad_normed")


@pytest.fixture(scope="module")
def report():
    done = run_python("-m", "tests.support.compile_kernels", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def count(kernel, kind, width):
    """Vector accesses of a kind; Triton names those of 16 bytes v4.b32."""
    return sum(number for name, number in kernel["accesses"].items() if name.startswith(kind) and width in name)


def test_every_kernel_compiles_for_both(report):
    names = {"cosine_forward", "cosine_backward", "cosine_backward_to_z", "crop", "crop_scattered"}
    names |= {"nt_xent_forward", "nt_xent_backward"}
    names |= {"batch_norm_statistics", "batch_norm_reduce_bare", "max_pool", "max_pool_backward"}
    names |= {f"pointwise_{name}_{channels}" for name in POINTWISE for channels in (64, 256)}
    names |= {
        f"batch_norm_{way}{form}" for way in ("apply", "reduce", "apply_backward") for form in ("", "_join", "_two")
    }
    names |= {f"{name}_{color}" for name in ("contrast", "views") for color in ("matrix", "exact")}
    assert set(report) == {f"{name} sm_{capability}" for name in names for capability in (80, 90)}


def test_nothing_spills(report):
    """But for a few registers of one kernel on an A100."""
    assert {name: kernel["stack"] for name, kernel in report.items() if kernel["stack"] > 24} == {}
    assert not any(kernel["stack"] for name, kernel in report.items() if name.endswith("sm_90"))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_loss_reads_a_row_of_2048_once_each_way_16_bytes_at_a_time(report, capability):
    """A program holds 2 rows of p and of z in bf16, 32 bytes of each a thread, in the code of either pair."""
    forward, backward = (report[f"cosine_{way} sm_{capability}"] for way in ("forward", "backward"))
    assert count(forward, "ld", "v4.b32") == count(backward, "ld", "v4.b32") == 2 * 2 * 2
    assert count(backward, "st", "v4.b32") == 2 * 2
    assert count(report[f"cosine_backward_to_z sm_{capability}"], "st", "v4.b32") == 2 * 2 * 2


def test_the_programs_of_the_augmenter_fit_a_multiprocessor_together(report):
    """One too many would run after all the others; 65,536 registers hold those of the first launch too."""
    threads = 32 * augment_triton.NUM_WARPS
    for name in ("views_matrix sm_80", "views_matrix sm_90", "views_exact sm_80", "views_exact sm_90"):
        registers = report[name]["reg"]
        programs = augment_triton.programs_that_fit(registers, 65536)
        assert augment_triton.FIRST_PROGRAMS <= programs <= augment_triton.MOST_PROGRAMS
        assert programs * registers * threads <= 65536
        assert programs == augment_triton.MOST_PROGRAMS or (programs + 1) * (registers + 7) * threads > 65536


@pytest.mark.parametrize(("registers", "programs"), [(72, 5), (80, 5), (97, 4), (125, 4), (128, 4), (129, 3), (255, 2)])
def test_the_number_of_programs_follows_the_registers(registers, programs):
    """125 is what Triton 3.6 gives exact colour on sm_90; 97 are allocated as 104."""
    assert augment_triton.programs_that_fit(registers, 65536) == programs


def test_the_augmenter_reads_and_writes_16_bytes_at_a_time(report):
    for capability in (80, 90):
        assert count(report[f"contrast_matrix sm_{capability}"], "ld", "v4.b32") == 1
        for color in ("matrix", "exact"):
            assert count(report[f"views_{color} sm_{capability}"], "st", "v4.b32") >= 1


def test_the_crops_are_stored_8_bytes_at_a_time_and_four_programs_fit(report):
    """8 elements a thread; 4 x 4 warps hide the loads' latency where a thread has at most 128 registers."""
    for name in ("crop sm_80", "crop sm_90", "crop_scattered sm_80", "crop_scattered sm_90"):
        assert count(report[name], "st", "v2.b32") == 1
        assert report[name]["reg"] <= 128


@pytest.mark.parametrize("capability", [80, 90])
def test_infonce_multiplies_on_tensor_cores_and_three_programs_fit_the_shared_memory(report, capability):
    """65,536 registers hold two of its programs; an A100 has 163 KiB of shared memory a multiprocessor."""
    for name in ("forward", "backward"):
        kernel = report[f"nt_xent_{name} sm_{capability}"]
        assert kernel["shared"] * 3 <= 163 * 1024
        assert kernel["tensor_cores"] > 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", POINTWISE)
def test_1x1_convolutions_multiply_on_tensor_cores_and_256_threads_or_more_fit(report, capability, name):
    """A multiprocessor has 65,536 registers and 163 (A100) or 227 KiB (H200) of shared memory."""
    num_warps = getattr(
        pointwise, "TILE_OF_" + {"gram": "ROWS_PRODUCT"}.get(name, name.removesuffix("_normed").upper())
    )[3]
    for channels in (64, 256):
        kernel = report[f"pointwise_{name}_{channels} sm_{capability}"]
        programs = min(
            65536 // (kernel["reg"] * 32 * num_warps), (227 if capability == 90 else 163) * 1024 // kernel["shared"]
        )
        assert programs * num_warps >= 8
        assert kernel["tensor_cores"] >= 4
        # Images and matrices move 16 bytes at a time, only numbers of a channel by themselves.
        assert count(kernel, "st", "v4.b32") >= 4
        assert kernel["accesses"].keys() <= {f"{way}.global.{size}" for way in ("ld", "st") for size in WIDTHS}


# Images that are read and written, and vectors of numbers a channel that are read: mean, variance, weight, bias, sums.
BATCH_NORM = {
    "apply": (1, 1, 4), "apply_join": (2, 1, 4), "apply_two": (2, 1, 8),
    "reduce": (2, 0, 4), "reduce_join": (4, 1, 1), "reduce_two": (5, 1, 2), "reduce_bare": (3, 1, 0),
    "apply_backward": (2, 1, 6), "apply_backward_join": (2, 1, 5), "apply_backward_two": (3, 2, 9),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", BATCH_NORM)
def test_batch_norm_reads_and_writes_each_of_its_images_once_16_bytes_at_a_time(report, capability, name):
    """A thread has 16 bf16 elements of each, two accesses, and 8 fp32 numbers of its channels, two as well."""
    kernel, (images, written, vectors) = report[f"batch_norm_{name} sm_{capability}"], BATCH_NORM[name]
    of_images = tuple(kernel["accesses"].get(f"{way}.global.v4.b32", 0) for way in ("ld", "st"))
    assert of_images == (2 * images + 2 * vectors, 2 * written)
    # A multiprocessor's registers hold four programs of a reduction, of four warps, and three of what is elementwise.
    programs, warps = (4, 4) if name.startswith("reduce") else (3, 8)
    assert programs * warps * 32 * kernel["reg"] <= 65536


@pytest.mark.parametrize("capability", [80, 90])
def test_batch_norms_statistics_are_read_64_bytes_a_thread(report, capability):
    kernel = report[f"batch_norm_statistics sm_{capability}"]
    assert kernel["accesses"]["ld.global.v4.b32"] == 4
    # Eight programs of four warps: 64 KiB on their way.
    assert 8 * 4 * 32 * kernel["reg"] <= 65536


@pytest.mark.parametrize("capability", [80, 90])
def test_the_max_pool_reads_and_writes_16_bytes_at_a_time(report, capability):
    """Nine places forward; backward up to four windows, whose gradients are 16 bytes and winners 8."""
    forward, backward = report[f"max_pool sm_{capability}"], report[f"max_pool_backward sm_{capability}"]
    assert (count(forward, "ld", "v4.b32"), count(forward, "st", "v4.b32")) == (9, 1)
    assert (count(backward, "ld", "v4.b32"), count(backward, "ld", "v2.b32"), count(backward, "st", "v4.b32")) == (
        4,
        4,
        1,
    )
