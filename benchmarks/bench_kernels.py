"""Every operation of `kernels`, by several providers: `python -m pytest benchmarks/bench_kernels.py`.

UMT_BENCH=tiny|b16|l16 chooses the shapes (default: b16 on a GPU, tiny on a CPU). extra_info of each result holds seconds,
GB/s, and the share of the copy rate measured in the same run (of a large copy within the device, bytes read plus written).
`python -m benchmarks.bench_kernels OUT.jsonl [NAME ...]` writes the same figures, a line each, without pytest-benchmark;
NAME keeps the operations whose name begins so.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.kernel_cases import DEVICE, SIZE, Case, cases


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


def measured_copy_rate() -> float:
    """Bytes read plus written per second by a copy too large for any cache."""
    source = torch.empty(2**30 if DEVICE.type == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def figures(case: Case, provider: str, copy_rate: float) -> dict[str, object]:
    """What is recorded of one provider of one operation."""
    seconds = seconds_of(case.providers[provider])
    rate = case.bytes_moved / seconds
    return {
        "kernel": case.name,
        "provider": provider,
        "size": SIZE,
        "seconds": seconds,
        "gb_per_s": rate / 1e9,
        "share_of_copy_rate": rate / copy_rate,
        "copy_gb_per_s": copy_rate / 1e9,
        "tflops": case.flops / seconds / 1e12,
    }


@pytest.fixture(scope="session")
def copy_rate() -> float:
    return measured_copy_rate()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each provider of each operation; made here, so that importing this module costs nothing."""
    pairs = [(case, provider) for case in cases() for provider in case.providers]
    metafunc.parametrize(("case", "provider"), pairs, ids=[f"{case.name}-{provider}" for case, provider in pairs])


def test_kernel(benchmark, copy_rate: float, case: Case, provider: str) -> None:
    call = case.providers[provider]

    def waited() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    # What pytest-benchmark itself times is a call as Python makes it, launch and wait included.
    benchmark.pedantic(waited, warmup_rounds=1, rounds=5)
    benchmark.extra_info.update(figures(case, provider, copy_rate))
    assert benchmark.extra_info["seconds"] > 0


def main(out: str, *names: str) -> None:
    """Writes a line for each provider as soon as it is timed: a run cut short leaves what it had."""
    rate = measured_copy_rate()
    with open(out, "w") as file:
        for case in cases():
            if case.name.startswith(names or ("",)):
                for provider in case.providers:
                    print(json.dumps(figures(case, provider, rate)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
