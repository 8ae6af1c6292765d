"""Videos that are cut in the middle: what is left of them is read, and whoever asks is told.

A download that broke off, or damage, ends a video for its decoder before its container says. Frames are then chosen among those
that decode, and nothing fails. It shows where a decoder stops with an error, where a container counts its frames (MP4, AVI),
and by its length where it has no sound. A Matroska file with sound that is cut between two packets is taken for a whole one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_NOTES: ContextVar[list[str] | None] = ContextVar("cuts", default=None)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """Collects a line for each cut video that is read within the block, by this thread."""
    notes: list[str] = []
    before = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(before)


def note(path: str | Path, decoded: int, announced: int) -> None:
    """Says that of a video's announced frames only so many decode."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(f"{path}: {decoded} of {announced} frames decode")
