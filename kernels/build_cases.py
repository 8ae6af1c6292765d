"""What `python -m kernels.build` builds: every kernel at the shapes of a B/16 and an L/16 step, with the bytes it moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels._launch import power_of_two, warps_for
from kernels.align_loss import align_loss_bwd_kernel, align_loss_fwd_kernel, rows_per_program
from kernels.linear.layers import row_statistics_kernel
from kernels.linear.product import GROUP, SCALE_BLOCK, product_kernel
from kernels.linear.product import tiling as product_tiling
from kernels.patch_gather import patch_gather_kernel
from kernels.quantize import DTYPES, LARGEST, TINY, dequantize_kernel, quantize_rows_kernel, tile
from kernels.semantic_mask import sample_visible_kernel, semantic_mask_kernel, tiling
from kernels.token_gather import gather_norm_kernel, token_gather_bwd_kernel, token_gather_fwd_kernel

# (width, heads, patch tokens per teacher frame, output width) of the two official sizes.
SIZES = {"b16": (768, 12, 196, 512), "l16": (1024, 16, 196, 768)}
# Clips, frames and visible tokens a frame of a step.
BATCH, FRAMES, KEPT = 64, 8, 40


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as its launcher would launch it at one of the official sizes."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    numbers: dict[str, float]
    constants: dict[str, Any]
    warps: int
    bytes_moved: float
    """Read and written by the operation's definition, each tensor once."""
    oldest: int = 80
    """The first architecture that has its types."""
    stages: int | None = None
    """Tiles on their way at once, where the launch says so."""


def semantic_mask_case(size: str, tokens: int, label: str = "") -> Case:
    """Keys as the teacher gives them: a view of the fused product of keys and values."""
    width, heads, _, _ = SIZES[size]
    kept = tokens - int(0.8 * tokens)
    tiles = tiling(tokens, 64, 2)
    warps = tiles.pop("num_warps")
    return Case(
        f"semantic_mask {size}{label}",
        semantic_mask_kernel,
        {"out": "*i32", "score_out": "*fp32", "q": "*bf16", "k": "*bf16", "seed": "*i64"},
        {
            "scale": 0.125,
            "L": tokens,
            "n": kept,
            "q_row": width,
            "q_head": 64,
            "k_row": (1 + tokens) * 2 * width,
            "k_head": 64,
            "k_token": 2 * width,
        },
        {"HEADS": heads, "D": 64, "RETURN": False, "UPCAST": False} | tiles,
        warps=warps,
        bytes_moved=BATCH * FRAMES * ((2 + tokens) * width * 2 + kept * 4),
    )


def quantized_cases(size: str) -> Iterator[Case]:
    """The inputs of the teacher's linear layers, as wide as it or as its MLP, and the widest product."""
    width, _, tokens, _ = SIZES[size]
    rows = BATCH * FRAMES * (1 + tokens)
    for channels in (width, 4 * width):
        for precision, pointer, oldest in (("int8", "*i8", 80), ("fp8", "*fp8e4nv", 89)):
            yield Case(
                f"quantize_rows {precision} {size} {channels}",
                quantize_rows_kernel,
                {"values": pointer, "scale": "*fp32", "x": "*bf16"},
                {"x_row": channels},
                {"K": channels, "BLOCK": power_of_two(channels), "LARGEST": LARGEST[DTYPES[precision]], "TINY": TINY},
                warps=warps_for(channels),
                bytes_moved=rows * (channels * 3 + 4),
                oldest=oldest,
            )
    yield Case(
        f"dequantize_product {size}",
        dequantize_kernel,
        {"out": "*bf16", "product": "*i32", "rows": "*fp32", "scale": "*fp32", "bias": "*fp32"},
        {"M": rows},
        {"N": channels} | tile(channels),
        warps=4,
        bytes_moved=rows * (channels * 6 + 4) + channels * 8,
    )


# SMs and shared bytes of a program: A100, H100, B200.
GPUS = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}
WIDTHS = {"bf16": 2, "i8": 1, "fp8e4nv": 1}


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
        {"bias": full, "residual": full},
        rows * (2 * hidden + 8 * width) + 2 * weight + 4 * width,
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


def cases(architecture: int = 80) -> Iterator[Case]:
    """Every kernel at B/16 and L/16, and the mask of frames of 384 pixels; products as that architecture runs them."""
    p8, p16, p32, i32 = "*u8", "*bf16", "*fp32", "*i32"
    n = FRAMES * KEPT
    rows, frames = BATCH * n, BATCH * FRAMES
    for size, (width, _, tokens, out) in SIZES.items():
        every = FRAMES * tokens
        yield Case(
            f"patch_gather {size}",
            patch_gather_kernel,
            {"out": p16, "video": p8, "visible": i32, "origin": i32},
            {
                "n": n,
                "rows": 14,
                "columns": 14,
                "stride_b": FRAMES * 224 * 224 * 3,
                "stride_t": 224 * 224 * 3,
                "stride_y": 224 * 3,
                "stride_x": 3,
                "stride_c": 1,
                **{f"{part}_{channel}": 0.5 for part in ("scale", "shift") for channel in "rgb"},
            },
            {"TUBELET": 1, "PATCH": 16, "BLOCK": 1024, "SCALED": True, "WINDOW": False},
            warps=4,
            bytes_moved=rows * (768 * 3 + 4),
        )
        gather = {"C": width, "BLOCK": power_of_two(width)}
        yield Case(
            f"token_gather forward {size}",
            token_gather_fwd_kernel,
            {"out": p16, "x": p16, "visible": i32, "table": p32},
            {"n": n, "tokens": every},
            gather | {"TABLE": True},
            warps=4,
            bytes_moved=rows * (width * 4 + 4) + every * width * 4,
        )
        yield Case(
            f"token_gather backward {size}",
            token_gather_bwd_kernel,
            {"dx": p16, "dout": p16, "visible": i32},
            {"n": n, "tokens": every},
            gather,
            warps=4,
            bytes_moved=rows * (width * 4 + 4) + BATCH * every * width * 2,
        )
        yield Case(
            f"gather_norm {size}",
            gather_norm_kernel,
            {"out": p16, "x": p16, "visible": i32, "weight": p32, "bias": p32},
            {"n": n, "tokens": every, "eps": 1e-5},
            gather | {"GATHER": True},
            warps=warps_for(width),
            bytes_moved=rows * (width * 4 + 4),
        )
        yield semantic_mask_case(size, tokens)
        yield Case(
            f"sample_visible {size}",
            sample_visible_kernel,
            {"out": i32, "score": p32, "seed": "*i64"},
            {"L": tokens, "n": KEPT},
            {"BLOCK": power_of_two(tokens)},
            warps=4,
            bytes_moved=frames * (tokens + KEPT) * 4,
        )
        pointers = {"student": p16, "target": p16, "visible": i32, "weight": p32, "bias": p32}
        numbers = {"rows_per_layer": rows, "n": n, "tokens": every, "eps": 1e-6}
        options = {"D": out, "BLOCK": power_of_two(out), "NORMALIZE": True, "LOSS": 0, "GATHER": True}
        yield Case(
            f"align_loss forward {size}",
            align_loss_fwd_kernel,
            {"out": p32} | pointers,
            numbers,
            options,
            warps=warps_for(out),
            bytes_moved=6 * rows * (out * 4 + 8),
        )
        yield Case(
            f"align_loss backward {size}",
            align_loss_bwd_kernel,
            {"dstudent": p16, "dweight": p32, "dbias": p32, "dout": p32} | pointers,
            numbers,
            options | {"ROWS": rows_per_program(6 * rows)},
            warps=warps_for(out),
            bytes_moved=6 * rows * (out * 6 + 8),
        )
        yield from quantized_cases(size)
        yield from linear_cases(size, architecture)
    yield semantic_mask_case("l16", 576, " 384 px")
