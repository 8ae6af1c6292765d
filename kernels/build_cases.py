"""What `python -m kernels.build` builds: every kernel at the shapes of a B/16 and an L/16 step, with the bytes it moves."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from kernels._launch import FUSED_OPTIONS, power_of_two, rows_per_program, warps_for
from kernels.align_loss import align_loss_bwd_kernel, align_loss_fwd_kernel
from kernels.build_case import BATCH, FRAMES, KEPT, SIZES, Case, Promise
from kernels.layer_norm import layer_norm_bwd_kernel, layer_norm_fwd_kernel
from kernels.layer_norm import warps as norm_warps
from kernels.linear.build_cases import linear_cases
from kernels.patch_gather import patch_gather_kernel
from kernels.patch_gather import tile as patch_tile
from kernels.quantize import (
    DTYPES,
    LARGEST,
    TINY,
    dequantize_kernel,
    norm_quantize_kernel,
    quantize_rows_kernel,
    tile,
)
from kernels.semantic_mask import sample_visible_kernel, semantic_mask_kernel, tiling
from kernels.token_gather import gather_norm_kernel, token_gather_bwd_kernel, token_gather_fwd_kernel


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
        # Beside the copied keys it loads the seed, and in parts a head's query and class key; it stores indices.
        promise=Promise(
            loads=64,
            narrow_loads=2 * 64 // tiles["BLOCK_D"],
            stores=32,
            matrix="HMMA",
            copies="cp.async",
            why="the keys are copied, not loaded",
        ),
    )


def patch_cases(size: str) -> Iterator[Case]:
    """The student's visible patches in the order of its weight, and all of the teacher's in that of the pixels."""
    tokens = SIZES[size][2]
    rows = BATCH * FRAMES * KEPT
    for label, last, count in (("", False, rows), ("channels_last ", True, BATCH * FRAMES * tokens)):
        tiles = patch_tile(16, 1, last)
        warps = tiles.pop("num_warps")
        yield Case(
            f"patch_gather {label}{size}",
            patch_gather_kernel,
            {"out": "*bf16", "video": "*u8", "visible": "*i32", "origin": "*i32"},
            {
                "n": count // BATCH,
                "stride_b": FRAMES * 224 * 224 * 3,
                "stride_t": 224 * 224 * 3,
                "stride_y": 224 * 3,
                "stride_x": 3,
                "stride_c": 1,
                **{f"{part}_{channel}": 0.5 for part in ("scale", "shift") for channel in "rgb"},
            },
            {
                "GRID_ROWS": 14,
                "GRID_COLUMNS": 14,
                "TUBELET": 1,
                "PATCH": 16,
                "SCALED": True,
                "WINDOW": False,
                "LAST": last,
                "PACKED": True,
            }
            | tiles,
            warps=warps,
            programs=count,
            bytes_moved=count * (768 * 3 + 4),
            promise=Promise(narrow_loads=1)
            if last
            else Promise(
                loads=32,
                narrow_loads=16,
                why="side by side in such a row are pixels of one channel, in memory 3 bytes apart: a byte is loaded at a time",
            ),
        )


def quantized_cases(size: str) -> Iterator[Case]:
    """The inputs of the teacher's linear layers, as wide as it or as its MLP, and the widest product."""
    width, _, tokens, _ = SIZES[size]
    rows = BATCH * FRAMES * (1 + tokens)
    for channels, normed in ((width, False), (4 * width, False), (width, True)):
        for precision, pointer, oldest in (("int8", "*i8", 80), ("fp8", "*fp8e4nv", 89)):
            affine = {"weight": "*fp32", "bias": "*fp32"} if normed else {}
            yield Case(
                f"{'norm_quantize' if normed else 'quantize_rows'} {precision} {size} {channels}",
                norm_quantize_kernel if normed else quantize_rows_kernel,
                {"values": pointer, "scale": "*fp32", "x": "*bf16"} | affine,
                {"x_row": channels} | ({"eps": 1e-5} if normed else {}),
                {"K": channels, "BLOCK": power_of_two(channels), "LARGEST": LARGEST[DTYPES[precision]], "TINY": TINY},
                warps=warps_for(channels),
                programs=rows,
                bytes_moved=rows * (channels * 3 + 4) + 8 * channels * normed,
                promise=Promise(narrow_stores=1),
                oldest=oldest,
            )
    yield Case(
        f"dequantize_product {size}",
        dequantize_kernel,
        {"out": "*bf16", "product": "*i32", "rows": "*fp32", "scale": "*fp32", "bias": "*fp32"},
        {"M": rows},
        {"N": 4 * width} | tile(4 * width),
        warps=4,
        programs=triton.cdiv(rows, tile(4 * width)["ROWS"]) * triton.cdiv(4 * width, tile(4 * width)["BLOCK"]),
        bytes_moved=rows * (24 * width + 4) + 32 * width,
        promise=Promise(narrow_loads=4),
    )


def norm_cases(size: str) -> Iterator[Case]:
    """A student's LayerNorm behind its attention: an fp32 stream, a bf16 branch and result."""
    width = SIZES[size][0]
    rows = BATCH * FRAMES * KEPT
    half, full = "*bf16", "*fp32"
    options = {"K": width, "BLOCK": power_of_two(width)}
    affine = {"weight": full, "bias": full}
    yield Case(
        f"layer_norm forward {size}",
        layer_norm_fwd_kernel,
        {"y": half, "z": full, "mean": full, "rstd": full, "x": full, "branch": half, "scale": full} | affine,
        {"x_row": width, "branch_row": width, "eps": 1e-6},
        options,
        warps=norm_warps(width),
        programs=rows,
        bytes_moved=rows * (12 * width + 12) + 8 * width,
        promise=Promise(narrow_loads=1, narrow_stores=2),
    )
    per_program = rows_per_program(rows)
    yield Case(
        f"layer_norm backward {size}",
        layer_norm_bwd_kernel,
        {"dx": full, "dbranch": half, "dweight": full, "dbias": full, "dy": half, "dz": full, "z": full}
        | dict.fromkeys(("mean", "rstd", "scale", "weight"), full),
        {"rows": rows, "dy_row": width, "dz_row": width, "z_row": width},
        options | {"ROWS": per_program},
        warps=norm_warps(width),
        programs=-(-rows // per_program),
        trips=per_program,
        bytes_moved=rows * (16 * width + 12) + 8 * width * -(-rows // per_program),
        promise=Promise(narrow_loads=3),
    )


def cases(architecture: int = 80) -> Iterator[Case]:
    """Every kernel at B/16 and L/16, and the mask of frames of 384 pixels; products as that architecture runs them."""
    p16, p32, i32 = "*bf16", "*fp32", "*i32"
    n = FRAMES * KEPT
    rows, frames = BATCH * n, BATCH * FRAMES
    for size, (width, _, tokens, out) in SIZES.items():
        every = FRAMES * tokens
        yield from patch_cases(size)
        gather = {"C": width, "BLOCK": power_of_two(width)}
        yield Case(
            f"token_gather forward {size}",
            token_gather_fwd_kernel,
            {"out": p16, "x": p16, "visible": i32, "table": p32},
            {"n": n, "tokens": every},
            gather | {"TABLE": True},
            warps=4,
            programs=rows,
            bytes_moved=rows * (width * 4 + 4) + every * width * 4,
            promise=Promise(narrow_loads=1),
        )
        yield Case(
            f"token_gather backward {size}",
            token_gather_bwd_kernel,
            {"dx": p16, "dout": p16, "visible": i32},
            {"n": n, "tokens": every},
            gather,
            warps=4,
            programs=rows,
            bytes_moved=rows * (width * 4 + 4) + BATCH * every * width * 2,
            promise=Promise(narrow_loads=1),
        )
        yield Case(
            f"gather_norm {size}",
            gather_norm_kernel,
            {"out": p16, "x": p16, "visible": i32, "weight": p32, "bias": p32},
            {"n": n, "tokens": every, "eps": 1e-5},
            gather | {"GATHER": True},
            warps=warps_for(width),
            programs=rows,
            bytes_moved=rows * (width * 4 + 4),
            promise=Promise(narrow_loads=1),
        )
        yield semantic_mask_case(size, tokens)
        yield Case(
            f"sample_visible {size}",
            sample_visible_kernel,
            {"out": i32, "score": p32, "seed": "*i64"},
            {"L": tokens, "n": KEPT},
            {"BLOCK": power_of_two(tokens)},
            warps=4,
            programs=frames,
            bytes_moved=frames * (tokens + KEPT) * 4,
            promise=Promise(loads=64, narrow_loads=2, stores=32, why="a row of scores is smaller than a program"),
        )
        pointers = {"student": p16, "target": p16, "visible": i32, "weight": p32, "bias": p32}
        numbers = {"n": n, "tokens": every, "eps": 1e-6}
        options = {"D": out, "BLOCK": power_of_two(out), "NORMALIZE": True, "LOSS": 0, "GATHER": True}
        yield Case(
            f"align_loss forward {size}",
            align_loss_fwd_kernel,
            {"out": p32} | pointers,
            numbers,
            options,
            warps=warps_for(out),
            options=FUSED_OPTIONS,
            programs=6 * rows,
            bytes_moved=6 * rows * (out * 4 + 8),
            promise=Promise(narrow_loads=1, stores=32, why="a row gives one number"),
        )
        per_program = rows_per_program(6 * rows)
        yield Case(
            f"align_loss backward {size}",
            align_loss_bwd_kernel,
            {"dstudent": p16, "dweight": p32, "dbias": p32, "dout": p32} | pointers,
            numbers | {"rows_per_layer": rows},
            options | {"ROWS": per_program},
            warps=warps_for(out),
            options=FUSED_OPTIONS,
            programs=6 * -(-rows // per_program),
            trips=per_program,
            bytes_moved=6 * rows * (out * 6 + 8),
            # A row's index and gradient are copied with it.
            promise=Promise(copies="cp.async", narrow_loads=2, narrow_copies=5),
        )
        yield from norm_cases(size)
        yield from quantized_cases(size)
        yield from linear_cases(size, architecture)
    yield semantic_mask_case("l16", 576, " 384 px")
