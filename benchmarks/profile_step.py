"""Where a stage-1 step spends its time, operator by operator: `python -m benchmarks.profile_step [tiny|b16|l16]`."""

from __future__ import annotations

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from umt_fast.bench.stage1 import fast_steps, stage1_config


def main(model: str) -> None:
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
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny")
