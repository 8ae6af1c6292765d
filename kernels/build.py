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

from kernels.align_loss import _ROWS_PER_PROGRAM, align_loss_bwd_kernel, align_loss_fwd_kernel
from kernels.patch_gather import patch_gather_kernel
from kernels.semantic_mask import _BLOCK_D, sample_visible_kernel, semantic_mask_kernel
from kernels.token_gather import token_gather_bwd_kernel, token_gather_fwd_kernel

# (width, heads, patch tokens per teacher frame, output width) of the two official sizes.
SIZES = {"b16": (768, 12, 196, 512), "l16": (1024, 16, 196, 768)}


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, argument types, compile-time constants, warps) as the launchers would ask for them."""
    p8, p16, p32, i32 = "*u8", "*bf16", "*fp32", "*i32"
    for size, (width, heads, tokens, out) in SIZES.items():
        block, out_block, token_block = (1 << (n - 1).bit_length() for n in (width, out, tokens))
        yield (
            f"patch_gather {size} uint8", patch_gather_kernel,
            {"out": p16, "video": p8, "visible": i32, "scale": p32, "shift": p32, "n": "i32", "rows": "i32",
             "columns": "i32"} | {f"stride_{axis}": "i32" for axis in "btyxc"},
            {"TUBELET": 1, "PATCH": 16, "BLOCK": 1024, "SCALED": True}, 4,
        )  # fmt: skip
        yield (
            f"token_gather forward {size}", token_gather_fwd_kernel,
            {"out": p16, "x": p16, "visible": i32, "table": p32, "n": "i32", "tokens": "i32"},
            {"C": width, "BLOCK": block, "TABLE": True}, 4,
        )  # fmt: skip
        yield (
            f"token_gather backward {size}", token_gather_bwd_kernel,
            {"dx": p16, "dout": p16, "visible": i32, "n": "i32", "tokens": "i32"}, {"C": width, "BLOCK": block}, 4,
        )  # fmt: skip
        yield (
            f"semantic_mask {size}", semantic_mask_kernel,
            {"out": i32, "score_out": p32, "q": p16, "k": p16, "seed": "*i64", "scale": "fp32", "L": "i32", "n": "i32"}
            | {name: "i32" for name in ("q_row", "q_head", "k_row", "k_head", "k_token")},
            {"HEADS": heads, "D": 64, "BLOCK_D": _BLOCK_D, "BLOCK": token_block, "RETURN": False}, 8,
        )  # fmt: skip
        yield (
            f"sample_visible {size}", sample_visible_kernel,
            {"out": i32, "score": p32, "seed": "*i64", "L": "i32", "n": "i32"}, {"BLOCK": token_block}, 4,
        )  # fmt: skip
        pointers = {"student": p16, "target": p16, "visible": i32, "weight": p32, "bias": p32}
        numbers = {"rows_per_layer": "i32", "n": "i32", "tokens": "i32", "eps": "fp32"}
        options = {"D": out, "BLOCK": out_block, "NORMALIZE": True, "LOSS": 0, "GATHER": True}
        yield (
            f"align_loss forward {size}", align_loss_fwd_kernel, {"out": p32} | pointers | numbers, options, 4
        )  # fmt: skip
        yield (
            f"align_loss backward {size}", align_loss_bwd_kernel,
            {"dstudent": p16, "dweight": p32, "dbias": p32, "dout": p32} | pointers | numbers,
            options | {"ROWS": _ROWS_PER_PROGRAM}, 4,
        )  # fmt: skip


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
    for name, kernel, types, constants, warps in cases():
        signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
        source = ASTSource(
            kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
        shared = {"dynamic_shared_bytes": compiled.metadata.shared}
        yield {"kernel": name, "sm": architecture, "warps": warps} | resources(compiled.asm["cubin"]) | shared


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or ["80", "90"]):
        for row in build(number):
            print(json.dumps(row))
