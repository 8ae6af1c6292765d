"""Builds every kernel ahead of time, without a GPU, at the shapes of B/16 and L/16: `python -m kernels.build [80 90]`.

Prints registers, spilled bytes and shared memory of each, read from the cubin by the cuobjdump that Triton carries, and the
time its bytes alone would take at a GPU's peak bandwidth: one JSON line per kernel and architecture, or with --table the
table of kernels/README.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels._launch import COMPILER_OPTIONS, power_of_two, warps_for
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
# Peak memory bandwidth in bytes per second, by architecture.
BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}


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
        f"semantic_mask {size}{label}", semantic_mask_kernel,
        {"out": "*i32", "score_out": "*fp32", "q": "*bf16", "k": "*bf16", "seed": "*i64"},
        {"scale": 0.125, "L": tokens, "n": kept, "q_row": width, "q_head": 64,
         "k_row": (1 + tokens) * 2 * width, "k_head": 64, "k_token": 2 * width},
        {"HEADS": heads, "D": 64, "RETURN": False, "UPCAST": False} | tiles,
        warps=warps, bytes_moved=BATCH * FRAMES * ((2 + tokens) * width * 2 + kept * 4),
    )  # fmt: skip


def quantized_cases(size: str) -> Iterator[Case]:
    """The inputs of the teacher's linear layers, as wide as it or as its MLP, and the widest product."""
    width, _, tokens, _ = SIZES[size]
    rows = BATCH * FRAMES * (1 + tokens)
    for channels in (width, 4 * width):
        for precision, pointer, oldest in (("int8", "*i8", 80), ("fp8", "*fp8e4nv", 89)):
            yield Case(
                f"quantize_rows {precision} {size} {channels}", quantize_rows_kernel,
                {"values": pointer, "scale": "*fp32", "x": "*bf16"}, {"x_row": channels},
                {"K": channels, "BLOCK": power_of_two(channels), "LARGEST": LARGEST[DTYPES[precision]], "TINY": TINY},
                warps=warps_for(channels), bytes_moved=rows * (channels * 3 + 4),
                oldest=oldest,
            )  # fmt: skip
    yield Case(
        f"dequantize_product {size}", dequantize_kernel,
        {"out": "*bf16", "product": "*i32", "rows": "*fp32", "scale": "*fp32", "bias": "*fp32"}, {"M": rows},
        {"N": channels} | tile(channels), warps=4, bytes_moved=rows * (channels * 6 + 4) + channels * 8,
    )  # fmt: skip


# SMs and shared bytes of a program: A100, H100, B200.
GPUS = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}
WIDTHS = {"bf16": 2, "i8": 1, "fp8e4nv": 1}


def product_case(
    name: str, architecture: int, kind: str, shape: tuple[int, int, int], out: str, pointers: dict[str, str],
    bytes_moved: float, *, a_t: bool = False, b_t: bool = False, wide: bool = False, **constants: Any,
) -> Case:  # fmt: skip
    """product_kernel as its launcher would launch it: (M, N, K) of operands of `kind`, by TMA on 90 and above."""
    M, N, K = shape
    sms, shared = GPUS.get(architecture, GPUS[80])
    tiles = product_tiling(M, N, WIDTHS[kind], architecture, sms, shared, wide=wide, saves="pre" in pointers)
    warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    high, across, depth = (tiles[f"BLOCK_{axis}"] for axis in "MNK")
    tma = architecture >= 90
    operands = {
        "a": f"tensordesc<{kind}[{depth}, {high}]>" if a_t else f"tensordesc<{kind}[{high}, {depth}]>",
        "b": f"tensordesc<{kind}[{depth}, {across}]>" if b_t else f"tensordesc<{kind}[{across}, {depth}]>",
    } if tma else {"a": f"*{kind}", "b": f"*{kind}"}  # fmt: skip
    pointers = {"out": out} | operands | pointers
    defaults = {
        "A_T": a_t, "B_T": b_t, "TMA": tma, "EVEN_K": K % depth == 0, "KIND": 0, "BACKWARD": False, "SPLITS": 1,
        "ACCUMULATE": False, "PRECISION": "ieee", "INTEGER": kind == "i8", "UPCAST": False, "BLOCK_SCALES": False,
        "LARGEST": {"*i8": 127.0, "*fp8e4nv": 448.0}.get(out, 0.0), "TINY": TINY, "GROUP": GROUP,
    }  # fmt: skip
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
        "M": M, "N": N, "K": K, "a_row": M if a_t else K, "b_row": N if b_t else K,
        "residual_row": N if "residual" in pointers else 0,
    }  # fmt: skip
    return Case(
        name, product_kernel, pointers, numbers,
        defaults | {name: None for name in optional if name not in pointers} | constants | tiles,
        warps=warps, bytes_moved=bytes_moved, oldest=89 if "fp8" in kind else 80, stages=stages,
    )  # fmt: skip


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
        "qkv", "bf16", (rows, 3 * width, width), half, {"bias": full},
        2 * (4 * rows * width + 3 * width**2) + 12 * width,
    )  # fmt: skip
    yield case(
        "gelu", "bf16", (rows, hidden, width), half, {"bias": full, "pre": half},
        2 * (rows * (width + 2 * hidden) + weight) + 4 * hidden, KIND=1,
    )  # fmt: skip
    yield case(
        "residual", "bf16", (rows, width, hidden), full, {"bias": full, "residual": full},
        rows * (2 * hidden + 8 * width) + 2 * weight + 4 * width,
    )  # fmt: skip
    yield case(
        "norm quick_gelu", "bf16", (frozen, hidden, width), half,
        {"bias": full, "mean": full, "rstd": full, "column": full},
        2 * (frozen * (width + hidden) + weight) + 8 * frozen + 8 * hidden, KIND=2,
    )  # fmt: skip
    yield Case(
        f"linear row_statistics {size}", row_statistics_kernel, {"mean": full, "rstd": full, "x": half},
        {"x_row": width, "eps": 1e-5}, {"K": width, "BLOCK": power_of_two(width)},
        warps=warps_for(width), bytes_moved=frozen * (2 * width + 8),
    )  # fmt: skip
    parts = -(-rows // 128)
    yield case(
        "backward gelu", "bf16", (rows, hidden, width), half, {"pre": half, "hidden": half, "sums": full},
        2 * (rows * (width + 3 * hidden) + weight) + 4 * parts * hidden, b_t=True, wide=True, KIND=1, BACKWARD=True,
    )  # fmt: skip
    yield case(
        "backward input", "bf16", (rows, width, hidden), half, {}, 2 * (rows * (width + hidden) + weight), b_t=True
    )
    yield case(
        "backward weight", "bf16", (hidden, width, rows), full, {}, 2 * rows * (width + hidden) + 4 * weight,
        a_t=True, b_t=True,
    )  # fmt: skip
    for kind in ("i8", "fp8e4nv"):
        label, scales = {"i8": "int8"}.get(kind, "fp8"), {"a_scale": full, "b_scale": full, "bias": full}
        yield case(
            label, kind, (frozen, 3 * width, width), half, scales,
            frozen * 7 * width + 3 * width**2 + 4 * frozen + 24 * width,
        )  # fmt: skip
        blocks = hidden // SCALE_BLOCK
        yield case(
            f"{label} quick_gelu {label}", kind, (frozen, hidden, width), f"*{kind}", scales | {"out_scale": full},
            frozen * (width + hidden + 4 + 4 * blocks) + weight + 8 * hidden, wide=True, KIND=2,
        )  # fmt: skip
        yield case(
            f"{label} blocks residual", kind, (frozen, width, hidden), half, scales | {"residual": half},
            frozen * (hidden + 4 * width + 4 * blocks) + weight + 8 * width, wide=True, BLOCK_SCALES=True,
        )  # fmt: skip


def cases(architecture: int = 80) -> Iterator[Case]:
    """Every kernel at B/16 and L/16, and the mask of frames of 384 pixels; products as that architecture runs them."""
    p8, p16, p32, i32 = "*u8", "*bf16", "*fp32", "*i32"
    n = FRAMES * KEPT
    rows, frames = BATCH * n, BATCH * FRAMES
    for size, (width, _, tokens, out) in SIZES.items():
        every = FRAMES * tokens
        yield Case(
            f"patch_gather {size}", patch_gather_kernel,
            {"out": p16, "video": p8, "visible": i32, "origin": i32},
            {"n": n, "rows": 14, "columns": 14, "stride_b": FRAMES * 224 * 224 * 3, "stride_t": 224 * 224 * 3,
             "stride_y": 224 * 3, "stride_x": 3, "stride_c": 1,
             **{f"{part}_{channel}": 0.5 for part in ("scale", "shift") for channel in "rgb"}},
            {"TUBELET": 1, "PATCH": 16, "BLOCK": 1024, "SCALED": True, "WINDOW": False},
            warps=4, bytes_moved=rows * (768 * 3 + 4),
        )  # fmt: skip
        gather = {"C": width, "BLOCK": power_of_two(width)}
        yield Case(
            f"token_gather forward {size}", token_gather_fwd_kernel,
            {"out": p16, "x": p16, "visible": i32, "table": p32}, {"n": n, "tokens": every}, gather | {"TABLE": True},
            warps=4, bytes_moved=rows * (width * 4 + 4) + every * width * 4,
        )  # fmt: skip
        yield Case(
            f"token_gather backward {size}", token_gather_bwd_kernel,
            {"dx": p16, "dout": p16, "visible": i32}, {"n": n, "tokens": every}, gather,
            warps=4, bytes_moved=rows * (width * 4 + 4) + BATCH * every * width * 2,
        )  # fmt: skip
        yield Case(
            f"gather_norm {size}", gather_norm_kernel,
            {"out": p16, "x": p16, "visible": i32, "weight": p32, "bias": p32},
            {"n": n, "tokens": every, "eps": 1e-5}, gather | {"GATHER": True},
            warps=warps_for(width), bytes_moved=rows * (width * 4 + 4),
        )  # fmt: skip
        yield semantic_mask_case(size, tokens)
        yield Case(
            f"sample_visible {size}", sample_visible_kernel,
            {"out": i32, "score": p32, "seed": "*i64"}, {"L": tokens, "n": KEPT}, {"BLOCK": power_of_two(tokens)},
            warps=4, bytes_moved=frames * (tokens + KEPT) * 4,
        )  # fmt: skip
        pointers = {"student": p16, "target": p16, "visible": i32, "weight": p32, "bias": p32}
        numbers = {"rows_per_layer": rows, "n": n, "tokens": every, "eps": 1e-6}
        options = {"D": out, "BLOCK": power_of_two(out), "NORMALIZE": True, "LOSS": 0, "GATHER": True}
        yield Case(
            f"align_loss forward {size}", align_loss_fwd_kernel, {"out": p32} | pointers, numbers, options,
            warps=warps_for(out), bytes_moved=6 * rows * (out * 4 + 8),
        )  # fmt: skip
        yield Case(
            f"align_loss backward {size}", align_loss_bwd_kernel,
            {"dstudent": p16, "dweight": p32, "dbias": p32, "dout": p32} | pointers, numbers,
            options | {"ROWS": rows_per_program(6 * rows)},
            warps=warps_for(out), bytes_moved=6 * rows * (out * 6 + 8),
        )  # fmt: skip
        yield from quantized_cases(size)
        yield from linear_cases(size, architecture)
    yield semantic_mask_case("l16", 576, " 384 px")


def source_of(case: Case) -> ASTSource:
    """A kernel with the specialisations a launch would make: ones become constants, multiples of 16 are known as such."""
    kernel, pointers, numbers = case.kernel, case.pointers, case.numbers
    signature, attributes = {}, {}
    constants = case.constants | {name: 1 for name, value in numbers.items() if value == 1}
    for position, name in enumerate(kernel.arg_names):
        value = numbers.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name) or ("fp32" if isinstance(value, float) else "i32")
        descriptor = pointers.get(name, "").startswith("tensordesc")
        if (name in pointers and not descriptor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=places, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, spilled (local) and stack bytes per thread, shared bytes of a cubin's kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {
        "registers": int(fields["REG"]),
        "spilled_bytes": int(fields["LOCAL"]) + int(fields["STACK"]),
        "shared_bytes": int(fields["SHARED"]),
    }


# The matrix instructions of the architectures, and how operands, spilled numbers and results travel.
INSTRUCTIONS = (
    "HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTMALDG", "LDGSTS.E.BYPASS.128",
    "LDGSTS", "LDG.E.128", "STG.E.128", "STG", "LDL", "STL",
)  # fmt: skip


def instructions(cubin: bytes) -> dict[str, int]:
    """How often a cubin's code holds each of INSTRUCTIONS, counting also their forms with more suffixes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    # Modifiers may stand between a name and its width: LDG.E.EL.128 is a load of 128 bits too.
    counts = dict.fromkeys(INSTRUCTIONS, 0)
    for wanted in INSTRUCTIONS:
        parts = wanted.split(".")
        counts[wanted] = sum(
            1 for name in found if name.split(".")[0] == parts[0] and set(parts) <= set(name.split("."))
        )
    return {name: count for name, count in counts.items() if count}


def build(architecture: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Compiles every case whose name starts with `only` for one architecture (80: A100, 90: H100 and H200, 100: B200) and
    yields its resources."""
    for case in cases(architecture):
        if case.oldest > architecture or not case.name.startswith(only):
            continue
        stages = {} if case.stages is None else {"num_stages": case.stages}
        compiled = triton.compile(
            source_of(case),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": case.warps} | stages | COMPILER_OPTIONS,
        )
        found = resources(compiled.asm["cubin"])
        found["shared_bytes"] += compiled.metadata.shared
        microseconds = {name: round(case.bytes_moved / rate * 1e6, 1) for name, rate in BANDWIDTH.items()}
        yield {
            "kernel": case.name, "sm": architecture, "warps": case.warps, "bytes": int(case.bytes_moved),
            "floor_us": microseconds, "instructions": instructions(compiled.asm["cubin"]),
        } | found  # fmt: skip


def table(architectures: list[int]) -> str:
    """The resources of all kernels and the times their bytes alone would take, as a Markdown table."""
    found = [{row["kernel"]: row for row in build(number)} for number in architectures]
    head = ["kernel", "MB moved", *(f"µs {name}" for name in BANDWIDTH), "warps"]
    head += [f"{what} sm_{number}" for number in architectures for what in ("registers", "shared")]
    lines = [head, ["---"] * len(head)]
    for case in cases():
        rows = [built.get(case.name, {}) for built in found]
        first = next(filter(None, rows), None)
        if first:
            line = [case.name, f"{first['bytes'] / 1e6:.1f}", *map(str, first["floor_us"].values()), first["warps"]]
            lines.append(line + [row.get(what, "-") for row in rows for what in ("registers", "shared_bytes")])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    chosen = [int(text) for text in sys.argv[1:] if text.isdigit()] or [80, 90]
    if min(chosen) < 80 or any(not text.isdigit() and text != "--table" for text in sys.argv[1:]):
        sys.exit(
            f"python -m kernels.build [--table] [80] [90] ...: {sys.argv[1:]} is not that; 80 (A100) is the oldest"
        )
    if "--table" in sys.argv:
        print(table(chosen))
    else:
        for number in chosen:
            for row in build(number):
                print(json.dumps(row))
