"""The device, its matmul rate, its memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import resource
import time
from collections.abc import Iterator

import torch

from umt_fast.config import ConfigError

log = logging.getLogger("umt_fast")


@functools.cache
def _say_left_out(device: str) -> None:
    log.warning("WARNING: this machine's %s device is not used: umt_fast computes on CUDA GPUs and CPUs", device)


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` is this rank's GPU if there is one, else the CPU. Raises ConfigError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use --device cpu (train: --run.device cpu)")
    if wanted == "auto" and not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator(check_available=True)
        if other is not None:
            _say_left_out(other.type)
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def device_of(device: str | torch.device) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or a torch.device. Raises ConfigError: no such device, or it is not there."""
    name = str(device)
    if name in ("auto", "cpu", "cuda"):
        return pick_device(name)
    number = name.removeprefix("cuda:")
    if number == name or not number.isdigit():
        raise ConfigError(f"device is {name!r}; give 'auto', 'cpu', 'cuda' or 'cuda:1'")
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no GPU; use 'cpu'")
    return pick_device("cuda", int(number))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 is slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def usable_dtype(wanted: str, device: torch.device) -> str:
    """`wanted`, or fp32 in place of bf16 on a CPU that would have to emulate it; says so in a warning.

    Emulated bf16 products are several times slower than fp32 ones and less exact, so nothing is lost.
    """
    if wanted == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        log.warning(
            "WARNING: this CPU has no bf16 instructions (AVX512-BF16, AMX); computing in fp32, which is faster here"
        )
        return "fp32"
    return wanted


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several: what the device really gives."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1536, 3)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@contextlib.contextmanager
def room_for(what: str) -> Iterator[None]:
    """Raises ConfigError, naming `what`, where the block asks for more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Allocators, of torch's CPU, CUDA and of Python, and sizes beyond 64 bits have no error of their own in common.
        said = next(iter(str(error).splitlines()), "")
        if not (
            isinstance(error, MemoryError) or re.search("to allocate|out of memory|size calculation overflowed", said)
        ):
            raise
        raise ConfigError(f"{what} does not fit into memory; make it smaller ({said})") from error


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the GPU since the last reset, or the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
