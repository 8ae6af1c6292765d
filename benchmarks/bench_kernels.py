"""Every operation of `kernels`, by several providers: `python -m pytest benchmarks/bench_kernels.py`.

UMT_BENCH=tiny|b16|l16 chooses the shapes (default: b16 on a GPU, tiny on a CPU). extra_info of each result holds seconds,
GB/s, and the share of the copy rate measured in the same run (of a large copy within the device, bytes read plus written).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.kernel_cases import DEVICE, SIZE, Case, cases

CASES = list(cases())


def seconds_of(call: Callable[[], object]) -> float:
    """Median seconds of a call: by device events and with a cold cache on a GPU, by the clock on a CPU."""
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=50, rep=200, return_mode="median") / 1e3
    call()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.fixture(scope="session")
def copy_rate() -> float:
    """Bytes read plus written per second by a copy too large for any cache."""
    source = torch.empty(2**30 if DEVICE.type == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, provider, id=f"{case.name}-{provider}") for case in CASES for provider in case.providers],
)
def test_kernel(benchmark, copy_rate: float, case: Case, provider: str) -> None:
    call = case.providers[provider]
    seconds = seconds_of(call)

    def waited() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    # What pytest-benchmark itself times is a call as Python makes it, launch and wait included.
    benchmark.pedantic(waited, warmup_rounds=1, rounds=5)
    rate = case.bytes_moved / seconds
    benchmark.extra_info.update(
        kernel=case.name,
        provider=provider,
        size=SIZE,
        seconds=seconds,
        gb_per_s=rate / 1e9,
        share_of_copy_rate=rate / copy_rate,
        copy_gb_per_s=copy_rate / 1e9,
        tflops=case.flops / seconds / 1e12,
    )
    assert seconds > 0
