"""Where the pixels of key frames are read: one-second files, extracted frames, or whole movies.

Each kind is an object with the members of Movies. All take the frames of a clip around its key frame, half of the span on each
side; where a movie begins or ends within the span, the longer half is cut to the shorter one, as the official reader does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from umt_fast.data.decode.boxes import Size
from umt_fast.data.decode.detection_clip import SecondFiles, Temporal, first_size
from umt_fast.data.decode.video import VideoError, decode_frames, open_video, rate_of, read_frame_folder
from umt_fast.data.errors import DataError
from umt_fast.extras import packages_of

Layout = Literal["seconds", "frames", "whole"]
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class Movies(Protocol):
    """Some movies, by name. Picklable; any process reads the same frames."""

    def require(self, keys: Iterable[tuple[str, int]]) -> None:
        """Looks for what key frames (movie, second) need before any is read. Raises DataError: some of it is missing."""

    def sizes(self, movies: Iterable[str]) -> dict[str, Size]:
        """Width and height of each movie; one that cannot be read is left out."""

    def read(self, movie: str, second: int, temporal: Temporal) -> np.ndarray:
        """The chosen frames of a clip, uint8 (num_frames, H, W, 3). Raises VideoError: they cannot be read."""


def around(temporal: Temporal, key: int, count: int, name: str, second: int) -> np.ndarray:
    """int64 (num_frames,): the chosen ones of a movie's `count` frames for the clip around frame `key`.

    Raises VideoError: the movie has no frame before the key frame, or it does not reach it.
    """
    half = min(key, count - key, temporal.span // 2)
    if half < 1:
        raise VideoError(
            f"{name}: second {second} is frame {key}, and the movie has {count}; a key frame needs frames on both sides: give "
            "--first_second and --frame_rate (train: --clips.first_second, --clips.frame_rate) as the movies are, or leave the "
            "key frame out"
        )
    return temporal.indices(2 * half) + key - half


def _require(missing: list[str], remedy: str) -> None:
    if missing:
        raise DataError(f"{len(missing)} movies are missing, the first is {missing[0]}; {remedy}")


class FrameFolders:
    """A folder of extracted frames for each movie, ROOT/MOVIE/, numbered from 1.

    Frame 1 shows the beginning of second first_second; there are `rate` frames a second. AVA's frames are extracted at 30
    frames a second from second 900 on, and called MOVIE_000001.jpg.
    """

    def __init__(self, root: str | Path, pattern: str, rate: float, first_second: int) -> None:
        """pattern: file name of a frame, its number in braces, and {movie} where the movie's name goes."""
        self.root, self.pattern, self.rate, self.first_second = Path(root), pattern, rate, first_second
        self._counts: dict[str, int] = {}

    def _name(self, movie: str) -> str:
        """The pattern of a movie's files, its number left in braces."""
        return self.pattern.replace("{movie}", movie.replace("{", "{{").replace("}", "}}"))

    def require(self, keys: Iterable[tuple[str, int]]) -> None:
        wanted = sorted({movie for movie, _ in keys})
        missing = [str(self.root / movie) for movie in wanted if not (self.root / movie).is_dir()]
        _require(
            missing, "extract the frames of every movie into a folder of its name below --root (train: --data.root)"
        )
        for movie in wanted:
            first = self.root / movie / self._name(movie).format(1)
            if not first.is_file():
                raise DataError(
                    f"{first} is missing; frames are numbered from 1 and named as {self.pattern!r} says, "
                    "--frame_pattern (train: --clips.frame_pattern)"
                )

    def sizes(self, movies: Iterable[str]) -> dict[str, Size]:
        with packages_of("video"):
            from PIL import Image

        found = {}
        for movie in movies:
            try:
                with Image.open(self.root / movie / self._name(movie).format(1)) as picture:
                    found[movie] = picture.size
            except OSError:
                continue
        return found

    def read(self, movie: str, second: int, temporal: Temporal) -> np.ndarray:
        folder = self.root / movie
        if movie not in self._counts:
            try:
                suffix = Path(self.pattern).suffix
                self._counts[movie] = sum(name.endswith(suffix) for name in os.listdir(folder))
            except OSError as error:
                raise VideoError(f"{folder}: {error.strerror}") from error
        count = self._counts[movie]
        key = round((second - self.first_second) * self.rate)
        chosen = around(temporal, key, count, str(folder), second)
        return read_frame_folder(folder, lambda _: chosen, count, self._name(movie))


class WholeMovies:
    """A video file for each movie, ROOT/MOVIE.mp4 (or mkv, webm, avi, mov), which begins with second first_second.

    Its frame rate is the container's. Every clip goes through the file's index: one-second files are read faster.
    """

    def __init__(self, root: str | Path, first_second: int) -> None:
        self.root, self.first_second = Path(root), first_second

    def _path(self, movie: str) -> Path | None:
        return next((path for path in self._candidates(movie) if path.is_file()), None)

    def _candidates(self, movie: str) -> list[Path]:
        return [self.root / f"{movie}{suffix}" for suffix in VIDEO_SUFFIXES]

    def require(self, keys: Iterable[tuple[str, int]]) -> None:
        wanted = sorted({movie for movie, _ in keys})
        missing = [str(self.root / f"{movie}.*") for movie in wanted if self._path(movie) is None]
        _require(missing, f"--root (train: --data.root) must hold one of {', '.join(VIDEO_SUFFIXES)} for every movie")

    def sizes(self, movies: Iterable[str]) -> dict[str, Size]:
        found = {movie: first_size(filter(Path.is_file, self._candidates(movie))) for movie in movies}
        return {movie: size for movie, size in found.items() if size is not None}

    def read(self, movie: str, second: int, temporal: Temporal) -> np.ndarray:
        path = self._path(movie)
        if path is None:
            raise VideoError(f"{self.root / movie}.*: no such file")
        return decode_frames(path, self._chooser(path, second, temporal))

    def _chooser(self, path: Path, second: int, temporal: Temporal) -> Callable[[int], np.ndarray]:
        container, stream = open_video(path)
        with container:
            rate = rate_of(stream)
        if rate <= 0:
            raise VideoError(
                f"{path}: the file tells no frame rate; cut it into one-second files or extract its frames"
            )
        key = round((second - self.first_second) * rate)
        return lambda count: around(temporal, key, count, str(path), second)


def open_movies(layout: Layout, root: str | Path, *, pattern: str, rate: float, first_second: int) -> Movies:
    """The movies of a folder in one of the layouts; the others' arguments are not read."""
    if layout == "seconds":
        return SecondFiles(root)
    if layout == "frames":
        return FrameFolders(root, pattern, rate, first_second)
    return WholeMovies(root, first_second)
