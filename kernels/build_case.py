"""What is built ahead of time and what its machine code must hold: a Case and its Promise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kernels._launch import COMPILER_OPTIONS

# (width, heads, patch tokens per teacher frame, output width) of the two official sizes.
SIZES = {"b16": (768, 12, 196, 512), "l16": (1024, 16, 196, 768)}
# Clips, frames and visible tokens a frame of a step.
BATCH, FRAMES, KEPT = 64, 8, 40


@dataclass(frozen=True, slots=True)
class Promise:
    """How a kernel moves its numbers, read from its machine code; see broken_promises in build.py.

    Of every kernel besides: no local memory and no atomics on global memory.
    """

    loads: int | None = 128
    """Bits that a thread loads at once from global memory; None: no tensor of the operation's size is loaded so."""
    narrow_loads: int | None = 0
    """How many loads may be narrower, of indices and seeds; None: any number, of what rows or columns have one of."""
    stores: int = 128
    """Bits that a thread stores at once."""
    narrow_stores: int = 0
    """How many stores may be narrower."""
    matrix: str | None = None
    """The matrix instruction that does the products; None: there is none."""
    copies: Literal["cp.async", "tma"] | None = None
    """What brings tiles to shared memory: copies of 16 bytes a thread, or TMA."""
    narrow_copies: int = 0
    """How many copies may be narrower."""
    why: str = ""
    """Why a width is below 16 bytes."""


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as its launcher would launch it at one of the official sizes."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    numbers: dict[str, float]
    constants: dict[str, Any]
    warps: int
    bytes_moved: float
    """Read and written by the operation's definition, each tensor once."""
    promise: Promise = Promise()
    oldest: int = 80
    """The first architecture that has its types."""
    stages: int | None = None
    """Tiles on their way at once, where the launch says so."""
    options: dict[str, Any] = field(default_factory=lambda: COMPILER_OPTIONS)
    """Of the compiler."""
    programs: int = 0
    """Of the launch, where each runs its code once, but for one loop; else 0."""
    trips: int = 1
    """How often a program runs its loop."""
