"""Compile every Triton kernel for GPUs that are not here, and print what came out of it as JSON.

A process of its own (python -m tests.support.compile_kernels): the tests' own process uses Triton's interpreter.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsiam.kernels import (
    augment_triton,
    batch_norm,
    batch_norm_triton,
    cosine_triton,
    crop_triton,
    nt_xent_triton,
    pointwise,
    pointwise_triton,
    pool,
)

# What a launch passes for the paper's shapes: [N, 2048] bf16 rows, contiguous, and uint8 crops of 224 px. The kernel
# that crops is that of 224 px out of 256.
COSINE_POINTERS = {"statistics": "*fp32", "partial": "*fp32", "loss": "*fp32", "grad": "*fp32", "counter": "*i32"}
AUGMENT_POINTERS = {"crops": "*u8", "out": "*bf16", "draws": "*fp32", "shift": "*fp32", "scratch": "*fp32"}
NT_XENT_POINTERS = {
    **dict.fromkeys(("queries", "keys", "rows_ptr", "columns_ptr", "temperature", "grad", "lse", "out"), "*fp32"),
    "own": "*i64",
}
# A batch norm's images, and what is of its channels.
BATCH_NORM_POINTERS = dict.fromkeys(
    (
        "partial", "out", "sums", "own_sums", "of_parameters", "statistics_a", "statistics_b", "weight_a", "weight_b",
        "weight", "bias_a", "bias_b", "bias", "mean_a", "variance_a", "mean_b", "variance_b",
    ),
    "*fp32",
) | {"counter": "*i32", "tracked_a": "*i64", "tracked_b": "*i64"}  # fmt: skip
POINTWISE_POINTERS = dict.fromkeys(("affine", "coefficients", "statistics", "offset", "partial"), "*fp32")
# C and C' of the last convolution in the bottlenecks of ResNet-50's first and third stage; the second and the fourth
# differ from the third in numbers alone.
POINTWISE_SHAPES = ((64, 256), (256, 1024))
CROP_POINTERS = {"images": "*u8", "boxes": "*fp32", "indices": "*i64", "out": "*u8"}


def variants(dim=2048):
    """Name, kernel, types of the arguments by name (bf16 pointers else), constants, warps."""
    block, rows = cosine_triton._tiling(dim)
    shape = {"D": dim, "TARGETS": 1, "ROWS": rows, "BLOCK": block}
    shape |= dict.fromkeys(("p_a_col", "p_b_col", "z_a_col", "z_b_col"), 1)
    forward = {**shape, "PARTIALS_BLOCK": cosine_triton.PARTIALS_BLOCK}
    yield "cosine_forward", cosine_triton._forward_kernel, COSINE_POINTERS, forward, cosine_triton.NUM_WARPS
    for to_z in (False, True):
        name = "cosine_backward_to_z" if to_z else "cosine_backward"
        yield name, cosine_triton._backward_kernel, COSINE_POINTERS, {**shape, "TO_Z": to_z}, cosine_triton.NUM_WARPS
    for exact in (False, True):
        for name, kernel in (("contrast", augment_triton._contrast_kernel), ("views", augment_triton._views_kernel)):
            rows = augment_triton.ROWS if exact or name == "views" else augment_triton.CONTRAST_ROWS
            constants = {"EXACT": exact, "ROWS": rows, "BLOCK": augment_triton.BLOCK}
            name = f"{name}_{'exact' if exact else 'matrix'}"
            yield name, kernel, AUGMENT_POINTERS, constants, augment_triton.NUM_WARPS
    tile = {"ROWS": crop_triton.TILE // crop_triton.BLOCK, "BLOCK": crop_triton.BLOCK}
    tile |= {"INDEXED": True, "SCATTERED": False}
    yield "crop", crop_triton._crop_kernel, CROP_POINTERS, tile, crop_triton.NUM_WARPS
    apart = {**tile, "INDEXED": False, "SCATTERED": True}
    table = {**CROP_POINTERS, "images": "*i64"}
    yield "crop_scattered", crop_triton._crop_kernel, table, apart, crop_triton.NUM_WARPS
    yield from nt_xent_variants()
    yield from batch_norm_variants()
    yield from pointwise_variants()
    pooled = {"KERNEL": 3, "STRIDE": 2, "PADDING": 1, "HEIGHT": 56, "WIDTH": 56, "C": 64, "COLUMNS": 64}
    pooled["ROWS"], winners = pool.TILE // 64, {"winners": "*u8"}
    yield "max_pool", pool._forward_kernel, winners, pooled, pool.NUM_WARPS
    yield "max_pool_backward", pool._backward_kernel, winners, pooled | {"HEIGHT": 112, "WIDTH": 112}, pool.NUM_WARPS


def batch_norm_variants(channels=256, views=2):
    """The forms of a ResNet-50's blocks: within, at a join, and at one with a downsampling shortcut."""
    shape = {"C": channels, "COLUMNS": 64, "ROWS": batch_norm.TILE // 64}
    of_rows = {**shape, "ROWS": batch_norm.LANES // 64, "PARTS_BLOCK": batch_norm.PARTS_BLOCK}
    eps = {"EPS_A": 1e-5, "EPS_B": 1e-5}
    forms = {
        "": {"TWO": False, "RESIDUAL": False, "JOIN": False, "TWO_GRADS": False},
        "_join": {"TWO": False, "RESIDUAL": True, "JOIN": True, "TWO_GRADS": True},
        "_two": {"TWO": True, "RESIDUAL": False, "JOIN": True, "TWO_GRADS": True},
    }
    launches = [("statistics", batch_norm_triton.statistics_kernel, {**of_rows, "DEEP": batch_norm.DEEP_STATISTICS})]
    for name, form in forms.items():
        forward = {"TWO": form["TWO"], "RESIDUAL": form["RESIDUAL"], "RELU": True, "RUNNING": True, "VIEWS": views}
        forward |= {**shape, **eps, "MOMENTUM_A": 0.1, "MOMENTUM_B": 0.1}
        reduce = {key: form[key] for key in ("JOIN", "TWO_GRADS")} | {
            "XS": 1 + form["TWO"],
            "RELU": True,
            "EPS": 1e-5,
            "DEEP": batch_norm.DEEP,
            **of_rows,
        }
        backward = {"TWO": form["TWO"], "RELU": not form["JOIN"], "VIEWS": views, **shape, **eps}
        launches += [
            (f"apply{name}", batch_norm_triton.apply_kernel, forward),
            (f"reduce{name}", batch_norm_triton.reduce_kernel, reduce),
            (f"apply_backward{name}", batch_norm_triton.apply_backward_kernel, backward),
        ]
    bare = {"XS": 0, "JOIN": True, "TWO_GRADS": True, "RELU": True, "EPS": 1e-5, "DEEP": batch_norm.DEEP, **of_rows}
    launches.append(("reduce_bare", batch_norm_triton.reduce_kernel, bare))
    for name, kernel, constants in launches:
        warps = batch_norm.REDUCTION_WARPS if "DEEP" in constants else batch_norm.NUM_WARPS
        yield f"batch_norm_{name}", kernel, BATCH_NORM_POINTERS, constants, warps


def pointwise_variants(shapes=POINTWISE_SHAPES):
    affine = torch.empty(3, 2, 1, device="meta")
    for channels, wide in shapes:
        x = torch.empty(2048, channels, 7, 7, device="meta")
        over_rows, tiles = pointwise._over_rows, pointwise._tiles
        launches = [
            ("gram", pointwise_triton.rows_product_kernel, over_rows(x, affine, channels)[1] | {"GRAM": True}),
            ("rows_product", pointwise_triton.rows_product_kernel, over_rows(x, affine, wide)[1] | {"GRAM": False}),
        ]
        of_join = {"C_IN": channels, "C": wide} | tiles(x, affine, wide, pointwise.TILE_OF_JOIN)[1]
        for form, normed in (("", False), ("_normed", True)):
            launches.append((f"join{form}", pointwise_triton.join_kernel, of_join | {"NORMED": normed}))
        of_dgrad = {"C_OUT": wide, "C": channels} | tiles(x, affine, channels, pointwise.TILE_OF_DGRAD)[1]
        launches.append(("dgrad", pointwise_triton.dgrad_kernel, of_dgrad))
        of_next = {"C_IN": channels, "C": wide} | tiles(x, affine, wide, pointwise.TILE_OF_JOIN_DGRAD)[1]
        for form, normed in (("", False), ("_normed", True)):
            launches.append((f"join_dgrad{form}", pointwise_triton.join_dgrad_kernel, of_next | {"NORMED": normed}))
        for name, kernel, constants in launches:
            num_warps = constants.pop("num_warps", pointwise.TILE_OF_ROWS_PRODUCT[3])
            constants = {key: value for key, value in constants.items() if key.isupper() and key != "VIEWS"}
            yield f"pointwise_{name}_{channels}", kernel, POINTWISE_POINTERS, constants, num_warps


def nt_xent_variants(dim=128):
    """SimCLR's form, which holds what the other forms do: the anchors are the rows and the columns."""
    shape = {"D": dim, "ROWS": nt_xent_triton.ROWS, "COLUMNS": nt_xent_triton.COLUMNS, "SLICE": nt_xent_triton.SLICE}
    shape["HAS_OWN"], warps = True, nt_xent_triton.NUM_WARPS
    backward = {**shape, "BY_ROW": True, "BY_COLUMN": True, "DEPTH": dim}
    yield "nt_xent_forward", nt_xent_triton._forward_kernel, NT_XENT_POINTERS, shape, warps
    yield "nt_xent_backward", nt_xent_triton._backward_kernel, NT_XENT_POINTERS, backward, warps


def compiled(kernel, pointers, constants, num_warps, capability):
    """The kernel as a launch with arguments divisible by 16 compiles it."""
    signature, values, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
            continue
        is_float = name.startswith(("scale_", "bias_")) and name not in pointers
        is_number = name in (
            "num_rows",
            "VIEWS",
            "num_columns",
            "rows_each",
            "count",
            "part_size",
            "size",
            "strips",
            "height",
            "width",
        ) or name.endswith(("_row", "_target"))
        signature[name] = "fp32" if is_float else "i32" if is_number else pointers.get(name, "*bf16")
        if not is_float:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": num_warps}
    if kernel.fn.__module__ == nt_xent_triton.__name__:
        options["num_stages"] = nt_xent_triton.NUM_STAGES
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin):
    """Registers a thread, and bytes of stack, which is what spilling uses."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def main():
    report = {}
    for name, kernel, pointers, constants, num_warps in variants():
        for capability in (80, 90):
            binary = compiled(kernel, pointers, constants, num_warps, capability)
            accesses = Counter(re.findall(r"(?:ld|st)\.global[\w.:]*", binary.asm["ptx"]))
            found = {"accesses": accesses, "shared": binary.metadata.shared}
            found["tensor_cores"] = len(re.findall(r"\bw?g?mma\.[\w.]*sync", binary.asm["ptx"]))
            report[f"{name} sm_{capability}"] = found | resources(binary.asm["cubin"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
