"""The device and its own rates, as one JSON object: `python -m benchmarks.machine`. All other figures are read beside them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import triton

from benchmarks.bench_kernels import measured_copy_rate
from benchmarks.kernel_cases import DEVICE
from umt_fast.engine.precision import cpu_has_bf16, measure_matmul_rate


def _commit() -> str:
    """The repository's commit, marked where files differ from it; empty outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    """The processor as Linux names it, its cores here, and which instructions for small numbers it has."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    has = {
        "AVX512-VNNI": torch.cpu._is_vnni_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    instructions = "".join(f", {'with' if there else 'no'} {name}" for name, there in has.items())
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{instructions}"


def main() -> None:
    gpu = DEVICE.type == "cuda"
    dtypes = [torch.float32] + ([torch.bfloat16] if gpu or cpu_has_bf16() else [])
    rates = {str(dtype).split(".")[1]: round(measure_matmul_rate(DEVICE, dtype) / 1e12, 3) for dtype in dtypes}
    record = {
        "device": torch.cuda.get_device_name() if gpu else _cpu(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "matmul_tflops": rates,
        "copy_gb_per_s": round(measured_copy_rate() / 1e9, 1),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
