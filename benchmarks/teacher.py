"""The teacher's forward pass in each of its precisions: `python -m benchmarks.teacher MODEL OUT.jsonl [BATCH]`.

Time, memory, and how far the targets of the same random weights are from those in the native precision. Where
TeacherConfig has no field `precision` there is nothing to compare, and this says so.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing

import torch
import torch.nn.functional as F

from benchmarks.bench_kernels import seconds_of
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import TeacherConfig
from umt_fast.objectives.unmasked_alignment import UnmaskedAlignment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(model: str, out: str, batch: str = "") -> None:
    if "precision" not in {field.name for field in dataclasses.fields(TeacherConfig)}:
        print("teacher: skipped, TeacherConfig has no field 'precision'")
        return
    clips = int(batch or (64 if DEVICE.type == "cuda" else 2))
    native = None
    with open(out, "w") as file:
        for precision in typing.get_args(typing.get_type_hints(TeacherConfig)["precision"]):
            row = {"model": model, "batch_size": clips, "precision": precision}
            try:
                found, row["seconds"], row["peak_memory_gib"] = measured(model, clips, precision)
                native = found if native is None else native
                row["cosine_to_first"] = F.cosine_similarity(found, native, dim=-1).mean().item()
            except (RuntimeError, ValueError, NotImplementedError) as error:  # a device without that precision
                row["error"] = str(error).splitlines()[0]
            print(json.dumps(row), file=file, flush=True)
            print(row)


def measured(model: str, clips: int, precision: str) -> tuple[torch.Tensor, float, float]:
    """The targets of one seed (K, B, n, D) in fp32, the seconds of a pass, and its peak memory in GiB."""
    config = stage1_config(model, clips, "bf16" if DEVICE.type == "cuda" else "fp32")
    config.teacher.precision = precision
    # Which tokens are visible must not depend on the precision: they are drawn evenly.
    config.mask.kind = "tube"
    torch.manual_seed(0)
    teacher = UnmaskedAlignment(config).to(DEVICE).teacher
    side, frames = config.student.image_size, config.student.num_frames
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (clips, frames, side, side, 3), dtype=torch.uint8, generator=generator).to(DEVICE)
    seed = torch.tensor([1], device=DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = teacher(video, config.mask, seed).targets.float()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return found, seconds_of(lambda: teacher(video, config.mask, seed)), peak


if __name__ == "__main__":
    main(*sys.argv[1:])
