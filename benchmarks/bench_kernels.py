"""Every operation of `kernels`, by several providers: `python -m pytest benchmarks/bench_kernels.py`.

UMT_BENCH=tiny|b16|l16 chooses the shapes (default: b16 on a GPU, tiny on a CPU). extra_info of each result holds seconds,
GB/s, and the share of the copy rate measured in the same run (of a large copy within the device, bytes read plus written).
`python -m benchmarks.bench_kernels OUT [NAME ...]` writes the same figures into OUT/kernels.jsonl, a line each, without
pytest-benchmark; NAME keeps the operations whose name begins so. What the file holds of this commit is not timed again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cases import DEVICE, SIZE, Case, cases


def seconds_of(call: Callable[[], object]) -> float:
    """Median seconds of a call; see spans_of."""
    return statistics.median(spans_of(call))


def spans_of(call: Callable[[], object], budget: float = 0.3) -> list[float]:
    """Seconds of each of several calls: the device's own time with a cold cache on a GPU, the clock's on a CPU.

    What the host needs to launch it counts only where the call makes the host wait for the device. budget: seconds.
    """
    if DEVICE.type == "cuda":
        return _device_spans(call, budget)
    call()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _device_spans(call: Callable[[], object], budget: float) -> list[float]:
    """The device idles until the whole call has been launched: a short kernel would else be timed as its launch."""
    cache = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        call()
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    launching = time.perf_counter() - started
    torch.cuda.synchronize()
    repeats = min(100, max(5, int(budget / (time.perf_counter() - started))))
    # Cycles of at most 2 GHz: twice the time that launching took, at least 0.1 ms.
    idle = int(2e9 * max(1e-4, 2 * launching))
    spans = []
    for _ in range(repeats):
        cache.zero_()
        torch.cuda._sleep(idle)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        spans.append(events[0].elapsed_time(events[1]) / 1e3)
    return spans


def measured_copy_rate() -> float:
    """Bytes read plus written per second by a copy too large for any cache."""
    source = torch.empty(2**30 if DEVICE.type == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def figures(case: Case, provider: str, copy_rate: float) -> dict[str, object]:
    """What is recorded of one provider of one operation, or the error that kept it from running."""
    row = {"kernel": case.name, "provider": provider, "size": SIZE, "copy_gb_per_s": copy_rate / 1e9}
    try:
        seconds = seconds_of(case.providers[provider])
    except Exception as error:
        # The figures of the others count all the same.
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    rate = case.bytes_moved / seconds
    return row | {
        "seconds": seconds,
        "gb_per_s": rate / 1e9,
        "share_of_copy_rate": rate / copy_rate,
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
    assert benchmark.extra_info.get("seconds", 0) > 0, benchmark.extra_info


def cache_bytes() -> int:
    """Bytes that the calls before may have left in the caches of a CPU; 0 on a GPU, whose cache is cleared between calls."""
    if DEVICE.type == "cuda":
        return 0
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size, shared = ((cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        sizes[level, shared] = int(size.removesuffix("K")) << 10
    largest = max((level for level, _ in sizes), default="")
    return sum(size for (level, _), size in sizes.items() if level == largest)


def bound_of(case: Case, copy_rate: float, matmul_rate: float, cache: int) -> float:
    """Seconds that the bytes or the FLOPs of an operation take at best, whichever is more; 0 where neither is known.

    Bytes that fit the cache need not come from memory, and bound nothing.
    """
    moved = case.bytes_moved if case.bytes_moved > cache else 0.0
    return max(moved / copy_rate, case.flops / matmul_rate if matmul_rate else 0.0)


def main(out: str, *names: str) -> None:
    """Writes a line for each provider as soon as it is timed: a run cut short leaves what it had."""
    from benchmarks import rates
    from benchmarks.timing import Lines

    lines, rate, cache = Lines(out, "kernels.jsonl"), measured_copy_rate(), cache_bytes()
    matmul = 1e12 * rates.read(lines.path.parent).get("matmul_tflops", 0.0)
    known = {(row["size"], row["kernel"], row["provider"]) for row in lines.known()}
    for case in cases():
        if not case.name.startswith(names or ("",)):
            continue
        bound = bound_of(case, rate, matmul, cache)
        for provider in case.providers:
            if (SIZE, case.name, provider) in known:
                continue
            row = figures(case, provider, rate)
            if bound and "seconds" in row:
                row |= {"bound_s": bound, "share_of_bound": bound / row["seconds"]}
            lines.add(row | {"how": rates.HOW})
            told = row["error"] if "error" in row else f"{row['seconds'] * 1e6:.1f} µs"
            print(f"{case.name}, {provider}: {told}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
