"""Builds every kernel ahead of time, without a GPU, at the shapes of B/16 and L/16: `python -m kernels.build [80 90]`.

Prints registers, spilled bytes and shared memory of each as one JSON line per kernel and architecture, read from the
cubin by the cuobjdump that Triton carries.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.align_loss import align_loss_bwd_kernel, align_loss_fwd_kernel, rows_per_program, warps_for
from kernels.patch_gather import patch_gather_kernel
from kernels.semantic_mask import sample_visible_kernel, semantic_mask_kernel, tiling
from kernels.token_gather import token_gather_bwd_kernel, token_gather_fwd_kernel

# (width, heads, patch tokens per teacher frame, output width) of the two official sizes.
SIZES = {"b16": (768, 12, 196, 512), "l16": (1024, 16, 196, 768)}


BATCH, FRAMES, KEPT = 64, 8, 40


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, float], dict[str, Any], int]]:
    """(name, kernel, pointer types, numbers, compile-time constants, warps) as the launchers would give them."""
    p8, p16, p32, i32 = "*u8", "*bf16", "*fp32", "*i32"
    n = FRAMES * KEPT
    for size, (width, heads, tokens, out) in SIZES.items():
        block, out_block, token_block = (1 << (n - 1).bit_length() for n in (width, out, tokens))
        every = FRAMES * tokens
        yield (
            f"patch_gather {size}", patch_gather_kernel,
            {"out": p16, "video": p8, "visible": i32, "scale": p32, "shift": p32, "origin": i32},
            {"n": n, "rows": 14, "columns": 14, "stride_b": FRAMES * 224 * 224 * 3, "stride_t": 224 * 224 * 3,
             "stride_y": 224 * 3, "stride_x": 3, "stride_c": 1},
            {"TUBELET": 1, "PATCH": 16, "BLOCK": 1024, "SCALED": True, "WINDOW": False}, 4,
        )  # fmt: skip
        yield (
            f"token_gather forward {size}", token_gather_fwd_kernel,
            {"out": p16, "x": p16, "visible": i32, "table": p32}, {"n": n, "tokens": every},
            {"C": width, "BLOCK": block, "TABLE": True}, 4,
        )  # fmt: skip
        yield (
            f"token_gather backward {size}", token_gather_bwd_kernel,
            {"dx": p16, "dout": p16, "visible": i32}, {"n": n, "tokens": every}, {"C": width, "BLOCK": block}, 4,
        )  # fmt: skip
        tiles = tiling(tokens, 64, 2)
        warps = tiles.pop("num_warps")
        yield (
            f"semantic_mask {size}", semantic_mask_kernel,
            {"out": i32, "score_out": p32, "q": p16, "k": p16, "seed": "*i64"},
            # Keys as the teacher gives them: a view of the fused product of keys and values.
            {"scale": 0.125, "L": tokens, "n": KEPT, "q_row": width, "q_head": 64,
             "k_row": (1 + tokens) * 2 * width, "k_head": 64, "k_token": 2 * width},
            {"HEADS": heads, "D": 64, "RETURN": False, "UPCAST": False} | tiles, warps,
        )  # fmt: skip
        yield (
            f"sample_visible {size}", sample_visible_kernel,
            {"out": i32, "score": p32, "seed": "*i64"}, {"L": tokens, "n": KEPT}, {"BLOCK": token_block}, 4,
        )  # fmt: skip
        pointers = {"student": p16, "target": p16, "visible": i32, "weight": p32, "bias": p32}
        numbers = {"rows_per_layer": BATCH * n, "n": n, "tokens": every, "eps": 1e-6}
        options = {"D": out, "BLOCK": out_block, "NORMALIZE": True, "LOSS": 0, "GATHER": True}
        yield (
            f"align_loss forward {size}", align_loss_fwd_kernel, {"out": p32} | pointers, numbers, options,
            warps_for(out),
        )  # fmt: skip
        yield (
            f"align_loss backward {size}", align_loss_bwd_kernel,
            {"dstudent": p16, "dweight": p32, "dbias": p32, "dout": p32} | pointers, numbers,
            options | {"ROWS": rows_per_program(6 * BATCH * n)}, warps_for(out),
        )  # fmt: skip


def source_of(kernel: Any, pointers: dict[str, str], numbers: dict[str, float], constants: dict[str, Any]) -> ASTSource:
    """A kernel with the specialisations a launch would make: ones become constants, multiples of 16 are known as such."""
    signature, attributes = {}, {}
    constants = constants | {name: 1 for name, value in numbers.items() if value == 1}
    for position, name in enumerate(kernel.arg_names):
        value = numbers.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name) or ("fp32" if isinstance(value, float) else "i32")
        if name in pointers or (isinstance(value, int) and value % 16 == 0):
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


def build(architecture: int) -> Iterator[dict[str, Any]]:
    """Compiles every case for one architecture (80: A100, 90: H100 and H200) and yields its resources."""
    for name, kernel, pointers, numbers, constants, warps in cases():
        source = source_of(kernel, pointers, numbers, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
        shared = {"dynamic_shared_bytes": compiled.metadata.shared}
        yield {"kernel": name, "sm": architecture, "warps": warps} | resources(compiled.asm["cubin"]) | shared


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or ["80", "90"]):
        for row in build(number):
            print(json.dumps(row))
