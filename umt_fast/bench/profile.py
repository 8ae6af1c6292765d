"""`bench STAGE --profile`: what each part of a step costs beside what it could cost at best.

A part's bound is the larger of its FLOPs over the matmul rate and its bytes over the copy rate, both measured in the same
run; parts.py counts FLOPs and bytes. The parts are timed eagerly within the Trainer's own steps, the device waited for at
each boundary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.bench.measure import Clock, restart_peak
from umt_fast.bench.parts import Cost
from umt_fast.bench.trained import Border, timed_step, trainer_of
from umt_fast.engine.host_memory import keep_freed_memory
from umt_fast.engine.precision import measure_matmul_rate, peak_memory_bytes


def measure_copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a buffer far larger than any cache; the best of several."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    clock, best = Clock(device), float("inf")
    for _ in range(5):
        start = clock.now()
        target.copy_(source)
        best = min(best, clock.now() - start)
    return 2 * source.numel() / best


def _gib(tensors: list[Tensor]) -> float:
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30, 3)


def profile(
    config: Any,
    make: Callable[[Any], nn.Module],
    batch: dict[str, Tensor],
    borders_of: Callable[[Any], Sequence[Border]],
    costs: Callable[[int], dict[str, Cost]],
    device: torch.device,
    steps: int,
) -> dict[str, object]:
    """Times the parts of `steps` steps after two warm-up steps; a table of them and of the memory, by name.

    Args:
        make: the objective of the configuration, with a teacher.
        batch: what it reads, on the device.
        borders_of: of the objective; the ends of the parts.
        costs: of the number of trained values; the cost of each part, by the names of the borders.
    """
    if device.type == "cpu":
        keep_freed_memory()  # as every run does
    torch.manual_seed(0)
    objective = make(config)
    trainer, step = trainer_of(config, objective, batch, device)
    borders = borders_of(objective)
    for _ in range(2):
        timed_step(step, borders, Clock(device))
    peak = 0
    clock, dtype = Clock(device), torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
    found: dict[str, list[float]] = {"matmul": [], "copy": []}
    for _ in range(steps):
        restart_peak(device)
        timed_step(step, borders, clock)
        peak = max(peak, peak_memory_bytes(device))
        # After each step: a shared machine's rates change.
        found["matmul"].append(measure_matmul_rate(device, dtype))
        found["copy"].append(measure_copy_rate(device))
    rates = {name: statistics.median(values) for name, values in found.items()}
    parameters = list(objective.trainable.parameters())
    cost_of = costs(sum(parameter.numel() for parameter in parameters))
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    teacher = [*objective.teacher.parameters(), *objective.teacher.buffers()]
    return {
        "parts": [_row(name, taken, cost_of[name], rates) for name, taken in clock.milliseconds().items()],
        "matmul_tflops": round(rates["matmul"] / 1e12, 4),
        "copy_gb_per_s": round(rates["copy"] / 1e9, 2),
        "memory_gib": {
            "trained": _gib(parameters),
            "gradients": _gib(parameters),
            "optimizer": _gib(state),
            "teacher": _gib(teacher),
            "peak": round(peak / 2**30, 3),
        },
    }


def _row(name: str, taken: float, cost: Cost, rates: dict[str, float]) -> dict[str, object]:
    """A part that took so many milliseconds, beside its bound."""
    bound = 1e3 * max(cost.flops / rates["matmul"], cost.bytes / rates["copy"])
    return {
        "part": name,
        "ms": taken,
        "gflop": round(cost.flops / 1e9, 3),
        "mb": round(cost.bytes / 1e6, 3),
        "bound_ms": round(bound, 3),
        "share_of_bound": round(bound / taken, 3),
    }


def table(found: dict[str, object]) -> str:
    """The profile for people: a line for each part, their sum, the rates and the memory."""
    parts = found["parts"]
    lines = ["| part | ms | GFLOP | MB | bound ms | share of bound |", "| --- | --- | --- | --- | --- | --- |"]
    total = {key: sum(row[key] for row in parts) for key in ("ms", "gflop", "mb", "bound_ms")}
    for row in [*parts, {"part": "sum", **total, "share_of_bound": total["bound_ms"] / total["ms"]}]:
        lines.append(
            f"| {row['part']} | {row['ms']:.1f} | {row['gflop']:.1f} | {row['mb']:.1f} | {row['bound_ms']:.1f} | "
            f"{100 * row['share_of_bound']:.0f}% |"
        )
    memory = ", ".join(f"{name} {value:.2f}" for name, value in found["memory_gib"].items())
    lines.append(
        f"\nmatmul {found['matmul_tflops']:.3f} TFLOP/s, copy {found['copy_gb_per_s']:.1f} GB/s; GiB: {memory}"
    )
    return "\n".join(lines)
