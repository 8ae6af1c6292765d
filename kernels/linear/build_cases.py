"""The products of kernels.linear as `python -m kernels.build` builds them: by TMA from compute capability 9.0 on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels._launch import power_of_two, warps_for
from kernels.build_case import BATCH, FRAMES, KEPT, SIZES, Case, Promise
from kernels.linear.norm import row_statistics_kernel
from kernels.linear.product import GROUP, SCALE_BLOCK, product_kernel
from kernels.linear.tiles import tiling as product_tiling
from kernels.quantize import TINY

# SMs and shared bytes of a program: A100, H100, B200.
GPUS = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}
WIDTHS = {"bf16": 2, "i8": 1, "fp8e4nv": 1}


# The matrix instruction of each architecture.
MATRIX = {
    80: {"bf16": "HMMA", "i8": "IMMA"},
    90: {"bf16": "HGMMA", "i8": "IGMMA", "fp8e4nv": "QGMMA"},
    100: {"bf16": "UTCHMMA", "i8": "UTCIMMA", "fp8e4nv": "UTCQMMA"},
}


def product_promise(architecture: int, kind: str, pointers: dict[str, str], backward: bool) -> Promise:
    """Tensor cores do the work; operands come by TMA or copies of 16 bytes, tensors of the result's size 16 bytes a thread."""
    return Promise(
        loads=128 if backward or "residual" in pointers else None,
        narrow_loads=None,
        # A scale of each row and block, or the sums of a tile's columns.
        narrow_stores=2 if "out_scale" in pointers or "sums" in pointers else 0,
        matrix=MATRIX.get(architecture, {}).get(kind),
        copies="tma" if architecture >= 90 else "cp.async",
        why="bias, scales and statistics are one number of a row or a column, and come from the cache",
    )


def product_case(
    name: str,
    architecture: int,
    kind: str,
    shape: tuple[int, int, int],
    out: str,
    pointers: dict[str, str],
    bytes_moved: float,
    *,
    a_t: bool = False,
    b_t: bool = False,
    wide: bool = False,
    **constants: Any,
) -> Case:
    """product_kernel as its launcher would launch it: (M, N, K) of operands of `kind`, by TMA on 90 and above."""
    M, N, K = shape
    sms, shared = GPUS.get(architecture, GPUS[80])
    tiles = product_tiling(M, N, WIDTHS[kind], architecture, sms, shared, wide=wide, saves="pre" in pointers)
    warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    high, across, depth = (tiles[f"BLOCK_{axis}"] for axis in "MNK")
    tma = architecture >= 90
    operands = (
        {
            "a": f"tensordesc<{kind}[{depth}, {high}]>" if a_t else f"tensordesc<{kind}[{high}, {depth}]>",
            "b": f"tensordesc<{kind}[{depth}, {across}]>" if b_t else f"tensordesc<{kind}[{across}, {depth}]>",
        }
        if tma
        else {"a": f"*{kind}", "b": f"*{kind}"}
    )
    pointers = {"out": out} | operands | pointers
    defaults = {
        "A_T": a_t,
        "B_T": b_t,
        "TMA": tma,
        "EVEN_K": K % depth == 0,
        "KIND": 0,
        "BACKWARD": False,
        "SPLITS": 1,
        "ACCUMULATE": False,
        "PRECISION": "ieee",
        "INTEGER": kind == "i8",
        "UPCAST": False,
        "BLOCK_SCALES": False,
        "LARGEST": {"*i8": 127.0, "*fp8e4nv": 448.0}.get(out, 0.0),
        "TINY": TINY,
        "GROUP": GROUP,
    }
    optional = (
        "out_scale",
        "pre",
        "hidden",
        "sums",
        "a_scale",
        "b_scale",
        "mean",
        "rstd",
        "column",
        "bias",
        "row_scale",
        "residual",
    )
    numbers = {
        "M": M,
        "N": N,
        "K": K,
        "a_row": M if a_t else K,
        "b_row": N if b_t else K,
        "residual_row": N if "residual" in pointers else 0,
    }
    return Case(
        name,
        product_kernel,
        pointers,
        numbers,
        defaults | {name: None for name in optional if name not in pointers} | constants | tiles,
        warps=warps,
        bytes_moved=bytes_moved,
        promise=product_promise(architecture, kind, pointers, constants.get("BACKWARD", False)),
        oldest=89 if "fp8" in kind else 80,
        stages=stages,
    )


def linear_cases(size: str, architecture: int) -> Iterator[Case]:
    """The products of student (a step's visible tokens) and teacher (all tokens), in the forms of kernels.linear."""
    width, _, tokens, _ = SIZES[size]
    hidden = 4 * width
    rows, frozen = BATCH * FRAMES * KEPT, BATCH * FRAMES * (1 + tokens)
    half, full = "*bf16", "*fp32"
    weight = width * hidden

    def case(label: str, *args: Any, **options: Any) -> Case:
        return product_case(f"linear {label} {size}", architecture, *args, **options)

    yield case(
        "qkv",
        "bf16",
        (rows, 3 * width, width),
        half,
        {"bias": full},
        2 * (4 * rows * width + 3 * width**2) + 12 * width,
    )
    yield case(
        "gelu",
        "bf16",
        (rows, hidden, width),
        half,
        {"bias": full, "pre": half},
        2 * (rows * (width + 2 * hidden) + weight) + 4 * hidden,
        KIND=1,
    )
    yield case(
        "residual",
        "bf16",
        (rows, width, hidden),
        full,
        {"bias": full, "row_scale": full, "residual": full},
        rows * (2 * hidden + 8 * width + 4) + 2 * weight + 4 * width,
    )
    yield case(
        "norm quick_gelu",
        "bf16",
        (frozen, hidden, width),
        half,
        {"bias": full, "mean": full, "rstd": full, "column": full},
        2 * (frozen * (width + hidden) + weight) + 8 * frozen + 8 * hidden,
        KIND=2,
    )
    yield Case(
        f"linear row_statistics {size}",
        row_statistics_kernel,
        {"mean": full, "rstd": full, "x": half},
        {"x_row": width, "eps": 1e-5},
        {"K": width, "BLOCK": power_of_two(width)},
        warps=warps_for(width),
        bytes_moved=frozen * (2 * width + 8),
        promise=Promise(stores=32, why="a row gives two numbers"),
    )
    yield from _linear_backward(size, architecture)
    yield from _linear_eight(size, architecture)


def _linear_backward(size: str, architecture: int) -> Iterator[Case]:
    """What the backward pass of a student's MLP multiplies."""
    width = SIZES[size][0]
    hidden = 4 * width
    rows = BATCH * FRAMES * KEPT
    half, full = "*bf16", "*fp32"
    weight = width * hidden

    def case(label: str, *args: Any, **options: Any) -> Case:
        return product_case(f"linear {label} {size}", architecture, *args, **options)

    parts = -(-rows // 128)
    yield case(
        "backward gelu",
        "bf16",
        (rows, hidden, width),
        half,
        {"pre": half, "hidden": half, "sums": full},
        2 * (rows * (width + 3 * hidden) + weight) + 4 * parts * hidden,
        b_t=True,
        wide=True,
        KIND=1,
        BACKWARD=True,
    )
    yield case(
        "backward input", "bf16", (rows, width, hidden), half, {}, 2 * (rows * (width + hidden) + weight), b_t=True
    )
    yield case(
        "backward weight",
        "bf16",
        (hidden, width, rows),
        full,
        {},
        2 * rows * (width + hidden) + 4 * weight,
        a_t=True,
        b_t=True,
    )


def _linear_eight(size: str, architecture: int) -> Iterator[Case]:
    """The teacher in 8 bits."""
    width, _, tokens, _ = SIZES[size]
    hidden = 4 * width
    frozen = BATCH * FRAMES * (1 + tokens)
    half, full = "*bf16", "*fp32"
    weight = width * hidden

    def case(label: str, *args: Any, **options: Any) -> Case:
        return product_case(f"linear {label} {size}", architecture, *args, **options)

    for kind in ("i8", "fp8e4nv"):
        label, scales = {"i8": "int8"}.get(kind, "fp8"), {"a_scale": full, "b_scale": full, "bias": full}
        yield case(
            label,
            kind,
            (frozen, 3 * width, width),
            half,
            scales,
            frozen * 7 * width + 3 * width**2 + 4 * frozen + 24 * width,
        )
        blocks = hidden // SCALE_BLOCK
        yield case(
            f"{label} quick_gelu {label}",
            kind,
            (frozen, hidden, width),
            f"*{kind}",
            scales | {"out_scale": full},
            frozen * (width + hidden + 4 + 4 * blocks) + weight + 8 * hidden,
            wide=True,
            KIND=2,
        )
        yield case(
            f"{label} blocks residual",
            kind,
            (frozen, width, hidden),
            half,
            scales | {"residual": half},
            frozen * (hidden + 4 * width + 4 * blocks) + weight + 8 * width,
            wide=True,
            BLOCK_SCALES=True,
        )
