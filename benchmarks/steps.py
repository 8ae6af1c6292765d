"""Whole stage-1 steps of one size in turns: `python -m benchmarks.steps SIZE`; gpu.py runs it.

Fast is the real Trainer's step (engine/trainer.py), on one batch that stays on the device; plain is the official step
of reference/stage1.py. Each variant is timed as soon as it is built, so that a run cut short keeps what it had; then all take
turns, then the profiler looks at two of them. `python -m benchmarks.steps official SIZE FOLDER` times the official code.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import rates
from benchmarks.profile_step import traced
from benchmarks.timing import DEVICE, GPU, Clocks, Lines, Row, back_to_back, out_folder, seconds_left, short, spread
from umt_fast.bench.measure import random_video
from umt_fast.bench.stage1 import plain_steps, stage1_config
from umt_fast.bench.trained import trainer_of
from umt_fast.config import Stage1Config
from umt_fast.engine.host_memory import keep_freed_memory
from umt_fast.engine.trainer import Trainer
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.tasks.pretraining import UnmaskedAlignment

WARM, STEPS, ROUNDS = (3, 20, 3) if GPU else (1, 2, 2)
HOW = (
    f"{STEPS} steps back to back timed by CUDA events, the host waiting once at the end; after {WARM} that are not timed; "
    "variants in turns; random clips that stay on the device"
    if GPU
    else f"{STEPS} steps back to back by the clock, after {WARM} that are not timed; variants in turns; random clips"
)
EIGHT = "fp8" if GPU and torch.cuda.get_device_capability() >= (9, 0) else "int8"
_GRAPH, _FUSED, _COMPILED = {"cuda_graph": True}, {"linear": "fused"}, {"compile": True}
# What each changes of the run; in order of value, since building the last ones takes longest. Fused products need a GPU.
VARIANTS: dict[str, dict[str, object]] = {
    name: changes
    for name, changes in {
        "eager": {},
        "plain": {},
        "graph": _GRAPH,
        "fused+graph": _FUSED | _GRAPH,
        "compiled+graph": _COMPILED | _GRAPH,
        f"fused+graph, {EIGHT} teacher": _FUSED | _GRAPH | {"precision": EIGHT},
        f"compiled+graph, {EIGHT} teacher": _COMPILED | _GRAPH | {"precision": EIGHT},
        "fused": _FUSED,
        "compiled": _COMPILED,
        f"eager, {EIGHT} teacher": {"precision": EIGHT},
    }.items()
    if GPU or "linear" not in changes
}
Step = Callable[[int], object]


def trainer_step(config: Stage1Config, video: Tensor) -> tuple[Step, Trainer]:
    """The Trainer's own step on one batch, as it runs between two log lines; config.run says how."""
    trainer, step = trainer_of(config, UnmaskedAlignment(config), {"video": video}, DEVICE)
    return lambda number: step(), trainer


def losses_of(trainer: Trainer) -> list[float]:
    """The losses since this was last asked; waits for the device."""
    found = [float(entry["values"]["loss"]) for entry in trainer.pending]
    trainer.pending.clear()
    return found


class Variant:
    """One way of running the step, built and warmed up."""

    def __init__(self, name: str, model: str, video: Tensor) -> None:
        self.name, self.losses, self.trainer = name, [], None
        changes = dict(VARIANTS[name])
        config = stage1_config(model, len(video), rates.NAME, changes.pop("precision", "native"))
        config.run = replace(config.run, out=tempfile.mkdtemp(), device=DEVICE.type, tensorboard=False, **changes)
        torch.manual_seed(0)
        if name == "plain":
            self.step: Step = plain_steps(config, video, DEVICE)[0]
        else:
            require_precision(config.teacher, DEVICE)
            self.step, self.trainer = trainer_step(config, video)
        for number in range(WARM):
            self.step(number)
        self.losses = losses_of(self.trainer) if self.trainer else []

    def timed(self) -> Row:
        """The figures of one turn."""
        for number in range(2 if GPU else 0):
            self.step(number)
        with Clocks() as clocks:
            whole, each, issued = back_to_back(self.step, STEPS)
        if self.trainer:
            losses_of(self.trainer)
        return {
            "steps": STEPS,
            "ms_per_step": round(1e3 * whole / STEPS, 3),
            "ms_spread": [round(1e3 * value, 3) for value in spread(each)],
            "ms_median": round(1e3 * statistics.median(each), 3),
            "host_ms_per_step": round(1e3 * issued / STEPS, 3),
            "clocks": clocks.row(),
        }


def clips_of(model: str) -> int:
    """Clips of a step, as UMT_BATCHES says or as rates.py has them."""
    given = dict(part.split("=") for part in os.environ.get("UMT_BATCHES", "").split())
    return int(given.get(model, rates.CLIPS[model]))


def peak_gib(before: int) -> float | None:
    """GiB that the allocator held at most above `before` since it was last reset."""
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3) if GPU else None


def main(model: str) -> None:
    """Writes a line for each turn of each variant, then the profiles."""
    out, clips = out_folder(), clips_of(model)
    lines, rate = Lines(out, "steps.jsonl"), rates.read(out).get("matmul_tflops")
    config = stage1_config(model, clips, rates.NAME)
    flops = UnmaskedAlignment.flops_of(config) * clips
    video = random_video(clips, config.student.num_frames, config.student.image_size, DEVICE)
    if not GPU:
        keep_freed_memory()  # as every run does
    about = {
        "bench": "step",
        "model": model,
        "batch_size": clips,
        "dtype": rates.NAME,
        "teacher": config.teacher.weights,
    }

    def turn(variant: Variant, number: int, extra: Row) -> None:
        row = variant.timed()
        seconds = row["ms_per_step"] / 1e3
        row |= {"clips_per_s": round(clips / seconds, 2), "tflops": round(flops / seconds / 1e12, 4)}
        row |= {"share_of_matmul_rate": round(flops / seconds / 1e12 / rate, 4)} if rate else {}
        row = lines.add(about | {"variant": variant.name, "turn": number} | row | extra | {"how": HOW})
        print(f"{model}, {clips} clips, {variant.name}: {row['clips_per_s']} clips/s", flush=True)

    built: list[Variant] = []
    whole, left_out = seconds_left(), []
    for name in os.environ.get("UMT_VARIANTS", "; ".join(VARIANTS)).split("; "):
        if seconds_left() < 0.35 * whole:
            left_out.append(name)  # the turns and profiles of those that are built are worth more
            continue
        before = torch.cuda.memory_allocated() if GPU else 0
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        try:
            variant = Variant(name, model, video)
            turn(variant, 0, {"losses": variant.losses, "peak_memory_gib": peak_gib(before)})
            built.append(variant)
            remember(out, lines, model)
        except Exception as error:  # one variant that fails must not take the others' figures with it
            traceback.print_exc()
            lines.add(about | {"variant": name, "error": short(error)})
        gc.collect()  # of one that did not fit
        torch.cuda.empty_cache()
    for number in range(1, ROUNDS):
        for variant in built:
            turn(variant, number, {})
    remember(out, lines, model)
    # The fastest last: its kernels are the ones worth reading.
    last = [v for v in built if v.name.startswith("compiled")][-1:] + [v for v in built if v.name.startswith("fused")][
        -1:
    ]
    for variant in [v for v in built if v.name == "eager"] + last:
        lines.add(about | {"bench": "profile", "variant": variant.name} | traced(variant.step, 3 if GPU else 1))
    if left_out:
        sys.exit(f"no time was left for {'; '.join(left_out)}: call again, compiled code is kept")


def remember(out: os.PathLike, lines: Lines, model: str) -> None:
    """Puts what a plan needs of the fastest exact variant into rates.json."""
    known = [
        row for row in lines.known() if row["bench"] == "step" and row["model"] == model and row["variant"] != "plain"
    ]
    exact = [row for row in known if "teacher" not in row["variant"] and "share_of_matmul_rate" in row]
    if exact:
        best = max(exact, key=lambda row: row["clips_per_s"])
        named = {"model": model, "share_of_matmul_rate": best["share_of_matmul_rate"], "share_of": best["variant"]}
        # The first size stays: a plan of another one is told which it was measured on.
        if rates.read(out).get("model", model) == model:
            rates.write(out, named)


def official(model: str, folder: str) -> None:
    """The official code's step by benchmarks/official.py, whose JSON lines are put beside ours."""
    asked = [sys.executable, "-m", "benchmarks.official", "stage1", "--folder", folder, "--model", model]
    asked += ["--batch_size", str(clips_of(model)), "--device", "auto", "--dtype", rates.NAME, "--steps", "5"]
    done = subprocess.run(asked, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    rows = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    lines = Lines(out_folder(), "steps.jsonl")
    for row in rows:
        lines.add(row | {"bench": "official", "model": model, "batch_size": clips_of(model)})
    if done.returncode or not rows:
        sys.exit(f"benchmarks.official ended with exit status {done.returncode} and {len(rows)} lines of figures")


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1] != "official" else official(*sys.argv[2:])
