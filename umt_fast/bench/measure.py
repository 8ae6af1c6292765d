"""What every benchmark of a training step shares: the clock, the timed loop, the JSON line."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError, TeacherPrecision
from umt_fast.engine.host_memory import keep_freed_memory
from umt_fast.engine.precision import measure_matmul_rate, peak_memory_bytes, usable_dtype

Model = Literal["tiny", "b16", "l16"]
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TEACHER_OF = {"tiny": "clip_tiny", "b16": "clip_b16", "l16": "clip_l14"}


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


# The training step, and the same step with a clock at each part's end, None where it has no parts (a compiled one); both
# take the step's number.
Steps = tuple[Callable[[int], None], Callable[[int, Clock], None] | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed, as the command line gave it."""

    model: Model
    batch_size: int
    device: torch.device
    dtype: str
    implementation: str
    steps: int
    compiled: bool = False
    precision: TeacherPrecision = "native"
    per_clip: int = 1
    """Masks of each clip in a step; stage 1 alone has several."""

    @functools.cached_property
    def computed_in(self) -> str:
        """What the step really computes in, on every implementation: nobody is measured emulating a dtype."""
        return usable_dtype(self.dtype, self.device)

    def profiled(self, stage: str) -> dict[str, object]:
        """What a line of the parts of a step is of."""
        return {
            "bench": "profile",
            "stage": stage,
            "model": self.model,
            "batch_size": self.batch_size,
            "torch": torch.__version__,
            "computed_in": self.computed_in,
        }

    def measure(self, bench: str, make: Callable[[], Steps], flops: float) -> dict[str, object]:
        """Times `steps` steps after two warm-up steps; every figure of the JSON line, by name.

        make builds the implementation. flops: what a step of the fast one needs; both are credited with these, so that wasted
        operations do not count. The matmul rate is measured after each step: a shared machine's changes.
        """
        computed = self.computed_in
        if self.implementation == "fast" and self.device.type == "cpu":
            keep_freed_memory()  # as every run does
        torch.manual_seed(0)
        step, timed = make()
        for number in range(2):
            step(number)
        clock, rates, peak = Clock(self.device), [], 0
        for number in range(self.steps):
            restart_peak(self.device)
            clock.restart()
            step(number)
            clock.lap("step")
            peak = max(peak, peak_memory_bytes(self.device))
            rates.append(measure_matmul_rate(self.device, TORCH_DTYPES[computed]))
        parts = Clock(self.device)
        for number in range(max(1, self.steps // 2) if timed is not None else 0):
            timed(number, parts)
        seconds, rate = statistics.median(clock.parts["step"]), statistics.median(rates)
        gpu = self.device.type == "cuda"
        return {
            "bench": bench,
            "model": self.model,
            "implementation": self.implementation,
            "compiled": self.compiled,
            "device": torch.cuda.get_device_name(self.device) if gpu else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": self.dtype,
            "computed_in": computed,
            "teacher_precision": self.precision,
            "batch_size": self.batch_size,
            "per_clip": self.per_clip,
            "steps": self.steps,
            "clips_per_s": round(self.batch_size / seconds, 4),
            "views_per_s": round(self.per_clip * self.batch_size / seconds, 4),
            "ms_per_step": round(1e3 * seconds, 3),
            "ms_per_part": parts.milliseconds(),
            "tflops": round(flops / seconds / 1e12, 4),
            "matmul_tflops": round(rate / 1e12, 4),
            "share_of_matmul_rate": round(flops / seconds / rate, 4),
            "peak_memory_gib": round(peak / 2**30, 3),
        }


def restart_peak(device: torch.device) -> None:
    """Forgets a GPU's peak so far: a matrix product that measures its rate takes memory too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def checked_case(*, device: str, compiled: bool = False, **values: object) -> Case:
    """A case whose values can work; raises ConfigError otherwise."""
    case = Case(device=torch.device("cpu"), compiled=compiled, **values)
    if case.batch_size < 1 or case.steps < 1:
        raise ConfigError(f"batch_size is {case.batch_size} and steps is {case.steps}; both must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU; use --device cpu")
    if compiled and case.implementation == "plain":
        raise ConfigError("compile is for the fast implementation; the plain implementation is the official eager step")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return Case(device=torch.device(name), compiled=compiled, **values)


def autocast(device: torch.device, dtype: str) -> torch.autocast | nullcontext:
    """Mixed precision as asked."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def random_video(batch_size: int, frames: int, side: int, device: torch.device) -> Tensor:
    """uint8 (B, T, side, side, 3), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch_size, frames, side, side, 3), dtype=torch.uint8, generator=generator).to(device)


def normalized(video: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) -> fp32 (B, 3, T, H, W), as the official loader delivers clips."""
    mean, std = (torch.tensor(values, device=video.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((video / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
