"""Which frames of a clip: integer arithmetic and a given random generator, nothing else.

Every function returns T frame numbers in [0, num_frames), ascending unless stated. `sparse_*` is the rule of the official
stage-1 reader, `interval_*` that of the official reader of captioned videos (stage 2, retrieval).
"""

from __future__ import annotations

import numpy as np


def sparse_train(num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame in each of `count` equal segments of num_frames // count frames (umt official stage-1 rule).

    A clip shorter than `count` repeats its first frame.
    """
    length = num_frames // count
    if length == 0:
        return np.zeros(count, np.int64)
    return np.arange(count) * length + rng.integers(length, size=count)


def sparse_center(num_frames: int, count: int) -> np.ndarray:
    """The middle frame of each of `count` equal real-valued segments; the same every time."""
    return (np.arange(count) * 2 + 1) * num_frames // (2 * count)


def intervals(num_frames: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame numbers (both inclusive) of min(count, num_frames) stretches that tile the clip."""
    edges = np.linspace(0, num_frames, min(count, num_frames) + 1).astype(np.int64)
    return edges[:-1], edges[1:] - 1


def interval_train(num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame of each interval but its last one (umt official `rand` rule).

    Where some interval is of one frame alone, `count` different frames of the whole clip are drawn instead. A clip shorter
    than `count` gives all its frames, then its last one again and again.
    """
    first, last = intervals(num_frames, count)
    if (first == last).any():
        return _padded(np.sort(rng.permutation(num_frames)[: len(first)]), count)
    return _padded(rng.integers(first, last), count)


def interval_middle(num_frames: int, count: int) -> np.ndarray:
    """The middle frame of each interval, rounded down; a short clip is padded as in interval_train (official `middle`)."""
    first, last = intervals(num_frames, count)
    return _padded((first + last) // 2, count)


def _padded(frames: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames))])


def dense_train(num_frames: int, count: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """`count` frames `rate` apart from a random start; past the end the last frame repeats."""
    span = (count - 1) * rate + 1
    start = int(rng.integers(max(1, num_frames - span + 1)))
    return np.minimum(start + np.arange(count) * rate, num_frames - 1)


def dense_center(num_frames: int, count: int, rate: int) -> np.ndarray:
    """`count` frames `rate` apart around the middle; past the end the last frame repeats."""
    span = (count - 1) * rate + 1
    return np.minimum(max(0, (num_frames - span) // 2) + np.arange(count) * rate, num_frames - 1)


def within_seconds(num_frames: int, rate: float, seconds: float) -> int:
    """How many frames of a clip to sample from: those of its first `seconds`, whole frames, at `rate` frames a second.

    At least one; seconds 0: all of them.
    """
    if not seconds or num_frames / rate <= seconds:
        return num_frames
    return max(1, int(seconds * rate))
