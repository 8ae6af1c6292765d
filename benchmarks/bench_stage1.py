"""Throughput of a whole stage-1 step: `pytest benchmarks/`.

The size is small by default so that any machine can compare two commits; UMT_BENCH=b16 or l16 takes the official sizes,
UMT_BENCH_BATCH the clips per step, UMT_BENCH_DTYPE fp32 or bf16. The figures of `bench stage1` are in extra_info.
"""

import os

import pytest
import torch

from umt_fast.bench.stage1 import fast_steps, plain_steps, stage1_config
from umt_fast.tasks.pretraining import UnmaskedAlignment

MODEL = os.environ.get("UMT_BENCH", "tiny")
BATCH = int(os.environ.get("UMT_BENCH_BATCH", "4"))
DTYPE = os.environ.get("UMT_BENCH_DTYPE", "bf16" if torch.cuda.is_available() else "fp32")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("implementation", ["fast", "plain"])
def test_stage1_step(benchmark, implementation: str) -> None:
    torch.manual_seed(0)
    config = stage1_config(MODEL, BATCH, DTYPE)
    side, frames = config.student.image_size, config.student.num_frames
    video = torch.randint(256, (BATCH, frames, side, side, 3), dtype=torch.uint8).to(DEVICE)
    if implementation == "fast":
        step, _ = fast_steps(config, video, DEVICE)
    else:
        step, _ = plain_steps(config, video, DEVICE)

    def timed() -> None:
        step(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, warmup_rounds=2, rounds=5)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        model=MODEL,
        dtype=DTYPE,
        clips_per_s=BATCH / seconds,
        tflops=UnmaskedAlignment.flops_of(config) * BATCH / seconds / 1e12,
    )
    assert seconds > 0
