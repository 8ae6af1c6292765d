"""Where a step's time goes on the device, by kernel and by kind of work, from torch's profiler; steps.py asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

# In this order: an attention kernel built on a matrix product's library is attention.
KINDS = {
    "attention": ("fmha", "flash", "attention", "scaled_dot", "sdpa"),
    "our kernels": ("_gather", "semantic", "sample_visible", "align", "quantize", "_scatter", "umt"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "::mm", "addmm", "bmm"),
    "normalization": ("layer_norm", "layernorm", "gammabeta", "computegradinput"),
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


def covered(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of (begin, end) pairs: the time within any of them, and from the first begin to the last end."""
    ordered = sorted(spans)
    if not ordered:
        return 0.0, 0.0
    busy, until = 0.0, ordered[0][0]
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy, until - ordered[0][0]


def traced(step: Callable[[int], object], steps: int, most: int = 15) -> dict[str, object]:
    """The shares of kinds of work and the costliest kernels of some steps; on a GPU also its busy share.

    busy_share: of the time from the first kernel's begin to the last one's end, the part in which any kernel ran. The
    profiler slows the host down, so where launches bound a step it is lower than without.
    """
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as trace:
        for number in range(steps):
            step(number)
        if gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    # On a GPU the operators' rows repeat the time of the kernels they launched.
    device = torch.autograd.DeviceType.CUDA
    rows = [row for row in trace.key_averages() if not gpu or row.device_type == device]
    rows = sorted(rows, key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows) or 1.0
    found: dict[str, object] = {"shares": shares((row.key, getattr(row, key)) for row in rows)}
    if gpu:
        spans = [(e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type == device]
        busy, whole = covered(spans)
        found |= {"busy_share": round(busy / whole, 4) if whole else 0.0, "kernels_per_step": len(spans) / steps}
    top = [
        {
            "name": row.key[:120],
            "share": round(getattr(row, key) / total, 4),
            "calls_per_step": row.count / steps,
            "us_per_step": round(getattr(row, key) / steps, 1),
        }
        for row in rows[:most]
    ]
    return found | {"top": top, "of": "device time by kernel" if gpu else "CPU time by operator"}
