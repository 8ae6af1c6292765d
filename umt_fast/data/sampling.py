"""Which frames of a clip: integer arithmetic and a given random generator, nothing else.

Every function returns T frame numbers in [0, num_frames), ascending unless stated.
"""

from __future__ import annotations

import numpy as np


def sparse_train(num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame in each of `count` equal segments of num_frames // count frames (umt official stage-1 rule).

    A clip shorter than `count` repeats frames: sorted draws with replacement; a clip of one frame repeats it.
    """
    length = num_frames // count
    if length > 0:
        return np.arange(count) * length + rng.integers(length, size=count)
    if num_frames > 1:
        return np.sort(rng.integers(num_frames, size=count))
    return np.zeros(count, np.int64)


def sparse_center(num_frames: int, count: int) -> np.ndarray:
    """The middle frame of each of `count` equal real-valued segments; the same every time."""
    return (np.arange(count) * 2 + 1) * num_frames // (2 * count)


def dense_train(num_frames: int, count: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """`count` frames `rate` apart from a random start; past the end the last frame repeats."""
    span = (count - 1) * rate + 1
    start = int(rng.integers(max(1, num_frames - span + 1)))
    return np.minimum(start + np.arange(count) * rate, num_frames - 1)


def dense_center(num_frames: int, count: int, rate: int) -> np.ndarray:
    """`count` frames `rate` apart around the middle; past the end the last frame repeats."""
    span = (count - 1) * rate + 1
    return np.minimum(max(0, (num_frames - span) // 2) + np.arange(count) * rate, num_frames - 1)
