"""Frames around key frames from extracted frames and whole movies; one-second files: test_detection_clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.detection_world import encode
from umt_fast.data.decode.detection_clip import Temporal
from umt_fast.data.decode.movies import FrameFolders, WholeMovies, open_movies
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError

COUNT, RATE, FIRST = 50, 10, 900


def picture(number: int) -> np.ndarray:
    """32 x 48, a gray level that tells the frame."""
    return np.full((32, 48, 3), 5 * number, np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Movie `m{1}` of five seconds from 900 on, as extracted frames and as a file; its name holds braces."""
    root = tmp_path_factory.mktemp("movies")
    (root / "m{1}").mkdir()
    for number in range(COUNT):
        Image.fromarray(picture(number)).save(root / "m{1}" / f"m{{1}}_{number + 1:06d}.png")
    encode(root / "m{1}.mkv", [picture(number) for number in range(COUNT)], RATE)
    return root


@pytest.fixture(params=["frames", "whole"])
def movies(request: pytest.FixtureRequest, root: Path) -> FrameFolders | WholeMovies:
    return open_movies(request.param, root, pattern="{movie}_{:06d}.png", rate=float(RATE), first_second=FIRST)


def levels(frames: np.ndarray) -> list[int]:
    return [round(value / 5) for value in frames.mean((1, 2, 3)).tolist()]


@pytest.mark.parametrize("second,count", [(902, 8), (901, 3), (904, 4)])
def test_frames_lie_around_the_key_frame(movies: FrameFolders | WholeMovies, second: int, count: int) -> None:
    """A window beyond the movie's ends is cut on both sides alike."""
    key = RATE * (second - FIRST)
    for span in (16, 40):
        half = min(span // 2, key, COUNT - key)
        temporal = Temporal(num_frames=count, rate=2, span=span, spread="even")
        part = 2 * half / count
        expected = [key - half + int(part / 2 + part * n) for n in range(count)]
        assert levels(movies.read("m{1}", second, temporal)) == expected
    window = Temporal(num_frames=3, rate=2, span=6)
    assert levels(movies.read("m{1}", second, window)) == [key - 3, key - 1, key + 1]
    assert levels(movies.read("m{1}", second, Temporal.of_key_frame(num_frames=3))) == [key] * 3


@pytest.mark.parametrize("second", [900, 899, 905, 2000])
def test_a_second_that_the_movie_does_not_reach(movies: FrameFolders | WholeMovies, second: int) -> None:
    with pytest.raises(
        VideoError, match=rf"second {second} is frame -?\d+, and the movie has 50; .*clips.first_second"
    ):
        movies.read("m{1}", second, Temporal())


def test_sizes_and_missing_movies(movies: FrameFolders | WholeMovies) -> None:
    assert movies.sizes(["m{1}", "absent"]) == {"m{1}": (48, 32)}
    movies.require([("m{1}", 902)])
    with pytest.raises(DataError, match=r"2 movies are missing, the first is .*/absent"):
        movies.require([("absent", 902), ("m{1}", 902), ("b", 902), ("absent", 903)])
    with pytest.raises(VideoError, match="absent"):
        movies.read("absent", 902, Temporal())


def test_frames_of_another_name_and_broken_ones(root: Path, tmp_path: Path) -> None:
    other = FrameFolders(root, "img_{:05d}.png", RATE, FIRST)
    with pytest.raises(
        DataError,
        match=r"img_00001.png is missing; frames are numbered from 1 and named as 'img_{:05d}.png' says, --frame_pattern",
    ):
        other.require([("m{1}", 902)])
    (tmp_path / "n").mkdir()
    for number in range(1, 21):
        (tmp_path / "n" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"9\.png: cannot identify"):
        FrameFolders(tmp_path, "{}.png", 10.0, 900).read("n", 901, Temporal(num_frames=2, rate=2, span=4))


def test_a_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "n.mp4").write_bytes(b"no video")
    movies = WholeMovies(tmp_path, 0)
    movies.require([("n", 1)])
    assert movies.sizes(["n"]) == {}
    with pytest.raises(VideoError, match="n.mp4"):
        movies.read("n", 1, Temporal())
