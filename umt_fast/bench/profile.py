"""`bench stage1 --profile`: what each part of a step costs beside what it could cost at best.

A part's bound is the larger of its FLOPs over the matmul rate and its bytes over the copy rate, both measured in the same
run. FLOPs (models/flops.py) and bytes are counted from shapes: matrix products, and what these and the passes between them
read and write when every elementwise operation is fused into a neighbor. The parts are timed eagerly within the Trainer's
own steps, the device waited for at each boundary.

Legend: B clips, T frames, L patches a frame, N = T * L, n visible tokens a view, C width, K aligned layers, D output width.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from umt_fast.bench.measure import Clock, restart_peak
from umt_fast.bench.trained import Border, timed_step, trainer_of
from umt_fast.config import Stage1Config
from umt_fast.engine.host_memory import keep_freed_memory
from umt_fast.engine.precision import measure_matmul_rate, peak_memory_bytes
from umt_fast.models.flops import frame_tower_parts, grid_of, tower_parts, visible_of
from umt_fast.tasks.pretraining import UnmaskedAlignment

# Elements a token, in widths, that a transformer block reads and writes: norm 2, qkv 4, attention 4, projection and
# residual 3, norm 2, first linear 5, second linear and residual 6.
BLOCK_TRAFFIC = 26


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of matrix products and bytes moved, of a batch."""

    flops: float
    bytes: float


def costs(config: Stage1Config, trained: int) -> dict[str, Cost]:
    """The cost of each part of a step of run.batch_size clips; trained: number of trained values."""
    vit, clip, layers, batch = config.student, config.teacher, config.align.num_layers, config.run.batch_size
    grid, n, views = grid_of(vit), visible_of(vit, config.mask), config.mask.per_clip
    size = 2 if config.run.dtype == "bf16" else 4
    c, d, seen, inner = clip.width, clip.output_dim, batch * views * n, clip.depth - 1
    rows, patch = batch * grid.frames * (grid.per_frame + 1), 3 * vit.tubelet_size * clip.patch_size**2
    teacher_weight = size if clip.precision == "native" else 1
    width, student_patch = vit.width, 3 * vit.tubelet_size * vit.patch_size**2
    teacher = frame_tower_parts(clip, vit, config.mask, num_layers=layers)
    student = tower_parts(vit, n, num_layers=layers, output_dim=d)
    block = size * (seen * BLOCK_TRAFFIC * width + (4 + 2 * vit.mlp_ratio) * width**2)
    embed = Cost(batch * views * student["patches"], seen * (student_patch * (1 + 2 * size) + 4 * width))
    heads = Cost(batch * views * student["heads"], layers * seen * size * (3 * width + d))
    forward = Cost(batch * views * student["blocks"], vit.depth * block)
    return {
        "teacher patches": Cost(batch * teacher["patches"], batch * grid.size * (patch * (1 + 2 * size) + size * c)),
        "teacher blocks": Cost(
            batch * teacher["blocks"], inner * (size * rows * BLOCK_TRAFFIC * c + teacher_weight * 12 * c * c)
        ),
        "last block, mask, targets": Cost(
            batch * teacher["last"],
            size * (6 * rows * c + seen * BLOCK_TRAFFIC * c + 12 * c * c + layers * seen * (2 * c + d)),
        ),
        "student patches": embed,
        "student blocks": forward,
        "student heads": heads,
        "loss": Cost(0, 2 * layers * seen * d * size),
        # Two products for each one of forward; the pixels take no gradient.
        "backward": Cost(
            2 * (forward.flops + heads.flops) + embed.flops,
            2 * (forward.bytes + heads.bytes) + embed.bytes + 3 * layers * seen * d * size,
        ),
        # Gradient norm; then AdamW reads parameter, gradient and two moments and writes three of them.
        "optimizer": Cost(0, 4 * 8 * trained),
    }


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


def borders_of(objective: UnmaskedAlignment) -> list[Border]:
    """The ends of the parts that `costs` names, up to the loss."""
    teacher, student = objective.teacher, objective.student
    blocks, found = teacher.blocks, []
    if len(blocks) > 1:
        found = [Border(blocks[0], "forward", True, "teacher patches")]
        found += [Border(blocks[-2], "forward", False, "teacher blocks")]
    return [
        *found,
        Border(teacher, "forward", False, "last block, mask, targets"),
        Border(student.encoder.blocks[0], "forward", True, "student patches"),
        Border(student.encoder, "forward", False, "student blocks"),
        Border(student, "forward", False, "student heads"),
        Border(objective, "forward", False, "loss"),
    ]


def _gib(tensors: list[Tensor]) -> float:
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30, 3)


def profile(config: Stage1Config, device: torch.device, steps: int) -> dict[str, object]:
    """Times the parts of `steps` steps after two warm-up steps; a table of them and of the memory, by name."""
    if device.type == "cpu":
        keep_freed_memory()  # as every run does
    torch.manual_seed(0)
    objective = UnmaskedAlignment(config)
    side, frames = config.student.image_size, config.student.num_frames
    video = torch.randint(256, (config.run.batch_size, frames, side, side, 3), dtype=torch.uint8).to(device)
    trainer, step = trainer_of(config, objective, {"video": video}, device)
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
    parameters = list(objective.student.parameters())
    cost_of = costs(config, sum(parameter.numel() for parameter in parameters))
    parts = []
    for name, taken in clock.milliseconds().items():
        cost = cost_of[name]
        bound = 1e3 * max(cost.flops / rates["matmul"], cost.bytes / rates["copy"])
        parts.append(
            {
                "part": name,
                "ms": taken,
                "gflop": round(cost.flops / 1e9, 3),
                "mb": round(cost.bytes / 1e6, 3),
                "bound_ms": round(bound, 3),
                "share_of_bound": round(bound / taken, 3),
            }
        )
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    teacher = [*objective.teacher.parameters(), *objective.teacher.buffers()]
    return {
        "parts": parts,
        "matmul_tflops": round(rates["matmul"] / 1e12, 4),
        "copy_gb_per_s": round(rates["copy"] / 1e9, 2),
        "memory_gib": {
            "student": _gib(parameters),
            "gradients": _gib(parameters),
            "optimizer": _gib(state),
            "teacher": _gib(teacher),
            "peak": round(peak / 2**30, 3),
        },
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
