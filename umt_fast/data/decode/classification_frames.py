"""Which frames of a video the official classification fine-tuning reads: integer arithmetic and a given generator.

A rule has three answers: `train` draws, `validation` is one fixed clip, `test` is clip `segment` of `segments`. Each is int64
(count,), frame numbers in [0, num_frames), ascending unless stated. All raise ValueError: num_frames or count below 1, or a
segment that does not exist. Where the official code does something odd, it is the default and named here, because its models
were judged that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from umt_fast.data.decode.sampling import sparse_train


class FrameRule(Protocol):
    """How clips are taken from a video of num_frames frames."""

    def train(self, num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray: ...

    def validation(self, num_frames: int, count: int) -> np.ndarray: ...

    def test(self, num_frames: int, count: int, segments: int, segment: int) -> np.ndarray: ...


def _check(num_frames: int, count: int, segments: int = 1, segment: int = 0) -> None:
    if num_frames < 1 or count < 1:
        raise ValueError(f"{count} frames of a video of {num_frames} frames; both must be at least 1")
    if not 0 <= segment < segments:
        raise ValueError(f"segment {segment} of {segments} does not exist; segments are numbered from 0")


@dataclass(frozen=True, slots=True)
class KineticsSparse:
    """One frame of each of `count` equal stretches of [0, num_frames - 1]: Kinetics, Moments in Time."""

    def train(self, num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Official quirk: both ends of a stretch can be drawn, so neighbors may give the same frame twice."""
        _check(num_frames, count)
        edges = np.rint(self._stretch(num_frames, count) * np.arange(count + 1)).astype(np.int64)
        return np.minimum(rng.integers(edges[:-1], edges[1:] + 1), num_frames - 1)

    def validation(self, num_frames: int, count: int) -> np.ndarray:
        return self.test(num_frames, count, 1, 0)

    def test(self, num_frames: int, count: int, segments: int, segment: int) -> np.ndarray:
        """Official quirk: the offset within a stretch is rounded down once, for all frames of the clip."""
        _check(num_frames, count, segments, segment)
        stretch = self._stretch(num_frames, count)
        start = np.rint(stretch * np.arange(count)).astype(np.int64)
        return np.minimum(start + int(stretch / (segments + 1) * (segment + 1)), num_frames - 1)

    @staticmethod
    def _stretch(num_frames: int, count: int) -> float:
        return (num_frames - 1) / count


def _interleaved(num_frames: int, count: int, segments: int, segment: int) -> np.ndarray:
    """Every `segments`-th of segments * count frames that are spread evenly over the video."""
    tick = num_frames / count
    places = [s * tick / segments + tick * np.arange(count) for s in range(segments)]
    return np.sort(np.concatenate(places).astype(np.int64))[segment::segments]


@dataclass(frozen=True, slots=True)
class Ssv2:
    """Something-Something V2 from video files."""

    def train(self, num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """One random frame of each segment of num_frames // count frames.

        Official quirk: a shorter video repeats frame 0.
        """
        _check(num_frames, count)
        return sparse_train(num_frames, count, rng)

    def validation(self, num_frames: int, count: int) -> np.ndarray:
        """The middle of each real-valued segment."""
        _check(num_frames, count)
        tick = num_frames / count
        return (tick / 2 + tick * np.arange(count)).astype(np.int64)

    def test(self, num_frames: int, count: int, segments: int, segment: int) -> np.ndarray:
        """Official quirk: always two interleaved clips, so that more segments than two would repeat frames: refused."""
        _check(num_frames, count, segments, segment)
        if segments > 2:
            raise ValueError(f"{segments} test segments of SSV2 videos; there are 2 different ones at most")
        return _interleaved(num_frames, count, 2, segment)


@dataclass(frozen=True, slots=True)
class Ssv2Folder:
    """Something-Something V2 from folders of pictures; frame i is picture i + 1."""

    def train(self, num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """As Ssv2.train, but a shorter video repeats frame 0 in front, then gives every frame."""
        _check(num_frames, count)
        return self._padded(num_frames, count) if num_frames < count else sparse_train(num_frames, count, rng)

    def validation(self, num_frames: int, count: int) -> np.ndarray:
        """Official quirk: segments of num_frames // count frames, so that the end of the video is never seen."""
        _check(num_frames, count)
        if num_frames < count:
            return self._padded(num_frames, count)
        length = num_frames // count
        return np.arange(count) * length + length // 2

    def test(self, num_frames: int, count: int, segments: int, segment: int) -> np.ndarray:
        """`segments` interleaved clips."""
        _check(num_frames, count, segments, segment)
        return _interleaved(num_frames, count, segments, segment)

    @staticmethod
    def _padded(num_frames: int, count: int) -> np.ndarray:
        return np.concatenate([np.zeros(count - num_frames, np.int64), np.arange(num_frames)])


@dataclass(frozen=True, slots=True)
class KineticsDense:
    """A window of count * rate frames: Kinetics read densely, UCF101, HMDB51."""

    rate: int = 4
    """Frames from one frame of the clip to the next."""

    def train(self, num_frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """A random window. Official quirk: the window that ends with the video's last frame is never drawn."""
        _check(num_frames, count)
        window = count * self.rate
        if num_frames <= window:
            return self._short(num_frames, count)
        return self._window(int(rng.integers(window, num_frames)), count)

    def validation(self, num_frames: int, count: int) -> np.ndarray:
        """Official quirk: the window ends where it should begin, so it may start before frame 0.

        Frames before 0 are counted from the video's end, as decord does; the numbers are then not ascending.
        """
        _check(num_frames, count)
        window = count * self.rate
        if num_frames <= window:
            return self._short(num_frames, count)
        return self._window((num_frames - window) // 2, count) % num_frames

    def test(self, num_frames: int, count: int, segments: int, segment: int) -> np.ndarray:
        """Windows from the video's start to its end; past the end the last frame read repeats.

        One segment starts at frame 0; the official code divides by zero there.
        """
        _check(num_frames, count, segments, segment)
        step = max((num_frames - count * self.rate) / max(1, segments - 1), 0)
        frames = np.arange(count) * self.rate + int(segment * step)
        return np.minimum(frames, frames[frames < num_frames][-1])

    def _window(self, end: int, count: int) -> np.ndarray:
        # Evenly spaced with both ends, then the end itself is moved one frame forward.
        start = end - count * self.rate
        return np.clip(np.linspace(start, end, count), start, end - 1).astype(np.int64)

    def _short(self, num_frames: int, count: int) -> np.ndarray:
        own = num_frames // self.rate
        spread = np.concatenate([np.linspace(0, num_frames, own), np.full(count - own, num_frames, float)])
        return np.clip(spread, 0, num_frames - 1).astype(np.int64)


RULES: dict[str, FrameRule] = {
    "kinetics_sparse": KineticsSparse(),
    "ssv2": Ssv2(),
    "ssv2_folder": Ssv2Folder(),
    "kinetics_dense": KineticsDense(),
}
"""The rules under their names; KineticsDense(rate) takes another rate than the official 4."""
