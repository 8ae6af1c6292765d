"""Host memory of a run on the CPU: blocks that a step frees are kept for the next one."""

from __future__ import annotations

import ctypes

# mallopt's parameters, by glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory in this process from now on; whether it could (glibc alone can).

    By default glibc maps every block above 32 MB (a step's activations) afresh and gives it back when it is freed, so each
    step takes, and the kernel zeroes, all its pages again: half a million page faults for four clips of B/16. The
    process stays at its peak size, as a training run does anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
