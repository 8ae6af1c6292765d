"""`bench stage1`: times a whole pre-training step on random clips and prints one JSON line.

The fast road is the objective that `train` runs; the plain road is `bench/plain.py`. A step is teacher, mask, student,
loss, backward and optimizer; the video is on the device when the clock starts (uint8 for the fast road, normalised fp32
for the plain one, as each trainer delivers it).
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

import kernels
from umt_fast.bench.plain import PlainStage1
from umt_fast.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AlignConfig,
    ConfigError,
    RunConfig,
    Stage1Config,
    TeacherPrecision,
)
from umt_fast.engine.optim import build_optimizer
from umt_fast.engine.precision import measure_matmul_rate, peak_memory_bytes, usable_dtype
from umt_fast.models.quantized import require_precision
from umt_fast.models.sizes import student_size, teacher_size
from umt_fast.objectives.unmasked_alignment import UnmaskedAlignment

Model = Literal["tiny", "b16", "l16"]
TEACHER_OF = {"tiny": "clip_tiny", "b16": "clip_b16", "l16": "clip_l14"}


def stage1_config(model: Model, batch_size: int, dtype: str, precision: TeacherPrecision = "native") -> Stage1Config:
    """The official stage-1 sizes of a model with an untrained teacher."""
    student = student_size(model)
    return Stage1Config(
        run=RunConfig(batch_size=batch_size, dtype=dtype),
        student=student,
        teacher=teacher_size(TEACHER_OF[model], weights="untrained", precision=precision),
        align=AlignConfig(num_layers=min(6, student.depth)),
    )


class Clock:
    """Adds up the time of named parts, waiting for the device at each boundary."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, list[float]] = {}
        self.restart()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def restart(self) -> None:
        self.started = self.now()

    def lap(self, part: str) -> None:
        moment = self.now()
        self.parts.setdefault(part, []).append(moment - self.started)
        self.started = moment

    def milliseconds(self) -> dict[str, float]:
        return {part: round(1e3 * statistics.median(laps), 3) for part, laps in self.parts.items()}


def fast_steps(
    config: Stage1Config, video: Tensor, device: torch.device, compiled: bool
) -> tuple[Callable[[int], None], Callable[[int, Clock], None]]:
    """The training step, and the same step with a clock at each part's end."""
    objective = UnmaskedAlignment(config).to(device).train()
    optimizer = build_optimizer(objective.trainable, config.optim, lr=1e-4)
    run = torch.compile(objective, fullgraph=True, dynamic=False) if compiled else objective
    batch = {"video": video}
    autocast = _autocast(device, config.run.dtype)

    def step(number: int) -> None:
        seed = torch.full((1,), number, dtype=torch.int64, device=device)
        run(batch, seed)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(number: int, clock: Clock) -> None:
        seed = torch.full((1,), number, dtype=torch.int64, device=device)
        clock.restart()
        target = objective.teacher(video, config.mask, seed)
        clock.lap("teacher and mask")
        with autocast:
            heads = objective.student(video, target.visible)
        clock.lap("student forward")
        student = objective.student
        loss = kernels.align_loss(heads, target.targets, student.norm_weight, student.norm_bias)
        clock.lap("loss")
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")

    return step, timed


def plain_steps(
    config: Stage1Config, video: Tensor, device: torch.device
) -> tuple[Callable[[int], None], Callable[[int, Clock], None]]:
    """The official step: see bench/plain.py."""
    mean = torch.tensor(IMAGENET_MEAN, device=device)
    std = torch.tensor(IMAGENET_STD, device=device)
    pixels = ((video / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
    objective = PlainStage1(config).to(device).train()
    for parameter in objective.teacher.parameters():  # zeros would make every attention map uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    parameters = list(objective.student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=config.optim.betas, weight_decay=config.optim.weight_decay)
    autocast = _autocast(device, config.run.dtype)

    def finish(loss: Tensor) -> None:
        loss.item()
        optimizer.zero_grad()
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
        optimizer.step()

    def step(number: int) -> None:
        with autocast:
            loss = objective(pixels)
        finish(loss)
        update()

    def timed(number: int, clock: Clock) -> None:
        clock.restart()
        with autocast:
            features, attention = objective.teacher(pixels)
        clock.lap("teacher")
        mask = objective.draw_mask(attention, pixels.shape[0]).to(device)
        clock.lap("mask")
        with autocast:
            loss = objective.loss(pixels, features, mask)
        clock.lap("student forward and loss")
        finish(loss)
        clock.lap("backward")
        update()
        clock.lap("optimizer")

    return step, timed


def _autocast(device: torch.device, dtype: str) -> torch.autocast | nullcontext:
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def measure(
    model: Model,
    batch_size: int,
    device: torch.device,
    dtype: str,
    road: str,
    steps: int,
    compiled: bool,
    precision: TeacherPrecision = "native",
) -> dict[str, object]:
    """Times `steps` steps after two warm-up steps; every figure of the JSON line, by name.

    TFLOP/s count the work the fast road needs (teacher forward, student forward and backward) for both roads: the
    plain road's wasted operations are not credited.
    """
    # The plain road does as it is told, as the official code would; the fast one does what `train` does.
    computed = usable_dtype(dtype, device) if road == "fast" else dtype
    config = stage1_config(model, batch_size, computed, precision)
    side, frames = config.student.image_size, config.student.num_frames
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (batch_size, frames, side, side, 3), dtype=torch.uint8, generator=generator).to(device)
    torch.manual_seed(0)
    roads = {
        "fast": lambda: fast_steps(config, video, device, compiled),
        "plain": lambda: plain_steps(config, video, device),
    }
    step, timed = roads[road]()
    for number in range(2):
        step(number)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    for number in range(steps):
        clock.restart()
        step(number)
        clock.lap("step")
    peak = peak_memory_bytes(device)
    parts = Clock(device)
    for number in range(max(1, steps // 2)):
        timed(number, parts)
    seconds = statistics.median(clock.parts["step"])
    flops = UnmaskedAlignment.flops_of(config) * batch_size
    rate = measure_matmul_rate(device, torch.bfloat16 if computed == "bf16" else torch.float32)
    return {
        "bench": "stage1",
        "model": model,
        "road": road,
        "compiled": compiled,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
        "computed_in": computed,
        "teacher_precision": precision,
        "batch_size": batch_size,
        "steps": steps,
        "clips_per_s": round(batch_size / seconds, 4),
        "ms_per_step": round(1e3 * seconds, 3),
        "ms_per_part": parts.milliseconds(),
        "tflops": round(flops / seconds / 1e12, 4),
        "matmul_tflops": round(rate / 1e12, 4),
        "share_of_matmul_rate": round(flops / seconds / rate, 4),
        "peak_memory_gib": round(peak / 2**30, 3),
    }


def main(
    model: Model = "b16",
    batch_size: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp32"] = "bf16",
    road: Literal["fast", "plain"] = "fast",
    steps: int = 5,
    compile: bool = False,
    precision: TeacherPrecision = "native",
    profile: bool = False,
) -> None:
    """Time a whole stage-1 training step on random clips; one JSON line.

    Args:
        model: Student; the teacher is the official one of that size, untrained.
        batch_size: Clips per step.
        device: Where; auto takes a GPU if there is one.
        dtype: Compute precision; the fast road computes in fp32 where a CPU has no bf16 instructions (see `computed_in`).
        road: fast is what `train` runs; plain does what the official step does.
        steps: Timed steps, after two that are not.
        compile: torch.compile the objective (fast road only).
        precision: As --teacher.precision of a run (fast road only).
        profile: Time the parts beside their floors instead, as a table on stderr and a JSON line (fast road only).
    """
    if batch_size < 1 or steps < 1:
        raise ConfigError(f"batch_size is {batch_size} and steps is {steps}; both must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU; use --device cpu")
    if road == "plain" and (compile or profile or precision != "native"):
        raise ConfigError(
            "compile, precision and profile are for the fast road; the plain one is the official eager step"
        )
    if compile and profile:
        raise ConfigError("profile times the parts of an eager step; leave compile out")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device(name)
    require_precision(teacher_size(TEACHER_OF[model], precision=precision), place)
    if not profile:
        print(json.dumps(measure(model, batch_size, place, dtype, road, steps, compile, precision)))
        return
    from umt_fast.bench import profile as parts

    config = stage1_config(model, batch_size, usable_dtype(dtype, place), precision)
    found = parts.profile(config, place, steps)
    print(parts.table(found), file=sys.stderr)
    print(
        json.dumps({"bench": "profile", "model": model, "batch_size": batch_size, "torch": torch.__version__} | found)
    )
