"""The frames of a detection clip: one-second files around a key frame.

A movie is a folder of files SECOND.mp4. The clip of second s is centered where file s begins. Files s, s + 1, ... give its
right half and s - 1, s - 2, ... its left half, each until half of `span` frames are there; the longer half is cut to the
shorter one. Files are first counted, which decodes one picture each, and then only those with chosen frames are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from umt_fast.data.decode.boxes import Size
from umt_fast.data.decode.video import VideoError, decode_frames, iterate_frames, outline, rotation_of
from umt_fast.data.errors import DataError

Spread = Literal["center", "even", "still"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Temporal:
    """Which frames of a clip. The defaults are the official scripts', with the released code."""

    num_frames: int = 8
    rate: int = 8
    """Frames from one chosen frame to the next with `center`."""
    span: int = 300
    """Frames that the clip has around its key frame."""
    spread: Spread = "center"
    """`center`: num_frames frames, rate apart, from the middle of the clip. `even`: the middles of num_frames equal parts of
    the whole clip. `still`: the key frame num_frames times, for what a single picture tells."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "rate"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.span < 2:
            raise DataError(f"span is {self.span}; a clip has at least one frame on each side of its key frame")
        if self.spread not in ("center", "even", "still"):
            raise DataError(f"spread is {self.spread!r}; choose 'center', 'even' or 'still'")

    @classmethod
    def of_key_frame(cls, *, num_frames: int = 8) -> Temporal:
        """The key frame alone, num_frames times; nothing around it is read."""
        return cls(num_frames=num_frames, span=2, spread="still")

    @classmethod
    def official(cls, *, sparse: bool, as_described: bool = False, num_frames: int = 8, rate: int = 8) -> Temporal:
        """What the official flag `--sparse` stands for.

        With the flag the released code reads 300 frames and takes a window of num_frames * rate out of their middle; without
        it, it reads num_frames * rate frames and takes the middles of equal parts. The description says the opposite: sparse
        is spread over all 300 frames, and dense is `rate` apart. as_described follows the description.
        """
        span = 300 if sparse else num_frames * rate
        spread: Spread = "center" if sparse != as_described else "even"
        return cls(num_frames=num_frames, rate=rate, span=span, spread=spread)

    def indices(self, count: int) -> np.ndarray:
        """int64 (num_frames,), the chosen ones of `count` frames, ascending; a window larger than the clip repeats its ends."""
        step = np.arange(self.num_frames)
        if self.spread == "still":
            return np.full(self.num_frames, count // 2)
        if self.spread == "center":
            first = (count - self.num_frames * self.rate) // 2 + (self.rate - 1) // 2
            return np.clip(first + step * self.rate, 0, count - 1)
        part = count / self.num_frames
        return np.clip((part / 2 + step * part).astype(np.int64), 0, count - 1)


class _OtherCount(Exception):
    """A file decodes to another number of frames than it announces."""


class SecondFiles:
    """A folder with a folder of one-second files for each movie."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._counts: dict[Path, int] = {}

    def require(self, keys: Iterable[tuple[str, int]]) -> None:
        """Looks for the two files beside each key frame (movie, second) before any is read: one listing a movie.

        Raises DataError: some are missing; how many, and the first one.
        """
        listed: dict[str, set[str]] = {}
        missing: list[str] = []
        for movie, second in keys:
            if movie not in listed:
                folder = self.root / movie
                listed[movie] = set(os.listdir(folder)) if folder.is_dir() else set()
            names = (f"{second - 1}.mp4", f"{second}.mp4")
            missing += [str(self.root / movie / name) for name in names if name not in listed[movie]]
        if missing:
            raise DataError(
                f"{len(missing)} one-second files are missing, the first is {missing[0]} (seconds have no leading "
                "zeros); cut each movie into files that reach half the clip's span beyond its key frames, or leave those out"
            )

    def read(self, movie: str, second: int, temporal: Temporal) -> np.ndarray:
        """The chosen frames of a clip, uint8 (num_frames, H, W, 3).

        Raises VideoError: a file that the clip's span reaches into is missing or unreadable, or pictures change size.
        """
        while True:
            try:
                return self._read(movie, second, temporal)
            except _OtherCount:
                # The true count is known now. Each turn lowers one, so this ends.
                continue

    def _read(self, movie: str, second: int, temporal: Temporal) -> np.ndarray:
        right = self._half(movie, second, 1, temporal.span // 2)
        left = self._half(movie, second - 1, -1, temporal.span - temporal.span // 2)[::-1]
        total_left, total_right = (sum(count for _, count in files) for files in (left, right))
        half = min(total_left, total_right)
        files = left + right
        chosen = temporal.indices(2 * half) + total_left - half
        first = np.cumsum([0, *(count for _, count in files)])
        owner = np.searchsorted(first, chosen, side="right") - 1
        parts = [
            self._frames(*files[number], chosen[owner == number] - first[number])
            for number in dict.fromkeys(owner.tolist())
        ]
        if len({part.shape[1:] for part in parts}) > 1:
            raise VideoError(f"{self.root / movie}: frames change size around second {second}")
        return np.concatenate(parts)

    def _half(self, movie: str, second: int, step: int, least: int) -> list[tuple[Path, int]]:
        """Files and their frame counts from a second on, in the direction of step, until there are `least` frames."""
        files: list[tuple[Path, int]] = []
        while sum(count for _, count in files) < least:
            path = self.root / movie / f"{second}.mp4"
            files.append((path, self._count(path)))
            second += step
        return files

    def _count(self, path: Path) -> int:
        if path not in self._counts:
            if not path.is_file():
                raise VideoError(
                    f"{path} is missing; cut each movie into one-second files that reach half the clip's span beyond its key "
                    "frames, or leave the key frame out"
                )
            self._counts[path] = outline(path).count or sum(1 for _ in iterate_frames(path))
        return self._counts[path]

    def _frames(self, path: Path, count: int, wanted: np.ndarray) -> np.ndarray:
        def choose(decodable: int) -> np.ndarray:
            if decodable != count:
                self._counts[path] = decodable
                raise _OtherCount
            return wanted

        return decode_frames(path, choose, num_frames=count)

    def sizes(self, movies: Iterable[str]) -> dict[str, Size]:
        """Width and height of each movie, read from one of its files; a movie without a readable one is left out."""
        folders = {movie: sorted((self.root / movie).glob("*.mp4")) for movie in movies}
        found = {movie: first_size(paths) for movie, paths in folders.items()}
        return {movie: size for movie, size in found.items() if size is not None}


def first_size(paths: Iterable[Path]) -> Size | None:
    """Width and height, rotation applied, of the first of some videos that can be read; None: none can."""
    for path in paths:
        try:
            picture = next(iterate_frames(path))
        except VideoError:
            continue
        turned = rotation_of(picture) % 180 != 0
        return (picture.height, picture.width) if turned else (picture.width, picture.height)
    return None
