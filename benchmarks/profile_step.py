"""Where a stage-1 step spends its time: `python -m benchmarks.profile_step [tiny|b16|l16] [OUT.json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from umt_fast.bench.stage1 import fast_steps, stage1_config

# In this order: an attention kernel built on a matrix product's library is attention.
KINDS = {
    "attention": ("fmha", "flash", "attention", "scaled_dot", "sdpa"),
    "our kernels": ("_gather", "semantic", "sample_visible", "align", "quantize", "_scatter", "umt"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "::mm", "addmm", "bmm"),
    "normalisation": ("layer_norm", "layernorm", "gammabeta", "computegradinput"),
    "optimizer": ("adam",),
    "copies and casts": ("memcpy", "memset", "copy_", "_to_copy", "cast"),
}


def kind_of(name: str) -> str:
    """The kind of work an operator or GPU kernel does, by its name."""
    low = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in low for word in words)), "other element-wise")


def shares(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(name, time) pairs -> the share of each kind, largest first."""
    sums: dict[str, float] = {}
    for name, time in times:
        sums[kind_of(name)] = sums.get(kind_of(name), 0.0) + time
    total = sum(sums.values()) or 1.0
    return {kind: round(sums[kind] / total, 4) for kind in sorted(sums, key=sums.get, reverse=True)}


def main(model: str = "b16", out: str = "") -> None:
    """Prints the thirty most expensive operators of three steps, by device time on a GPU and by CPU time without one."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    batch = 32 if gpu else 2
    config = stage1_config(model, batch, "bf16" if gpu else "fp32")
    side, frames = config.student.image_size, config.student.num_frames
    video = torch.randint(256, (batch, frames, side, side, 3), dtype=torch.uint8).to(device)
    step, _ = fast_steps(config, video, device, False)
    step(0), step(1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with profile(activities=activities) as trace:
        for number in range(3):
            step(number)
        if gpu:
            torch.cuda.synchronize()
    rows = trace.key_averages()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(rows.table(sort_by=key, row_limit=30, max_name_column_width=60))
    # On a GPU the operators' rows repeat the time of the kernels they launched.
    kernels = [row for row in rows if not gpu or row.device_type == torch.autograd.DeviceType.CUDA]
    found = shares((row.key, getattr(row, key)) for row in kernels)
    print(found)
    if out:
        with open(out, "w") as file:
            json.dump({"model": model, "batch_size": batch, "shares": found}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
