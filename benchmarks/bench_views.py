"""What 4 x 3 test views of a video cost beside its one validation view: `pytest benchmarks/bench_views.py`.

Real clips of $UMT_SHARED/videos, 8 frames of 224 pixels a view, one thread. test.mp4 and demo.mp4 last about 10 s, part_0.mp4
1 s. `one`: the validation view. `twelve`: all test views from one decode (data/decode/multi_view.py). `twelve_apart`: as the
official reader has them, one decode for each view. `one_from_all`: the validation view by decoding every frame up to its last
one, as decord and so the official reader do. `decoded_one` and `decoded_twelve`: their share of decoding alone, without colors,
resizing and crops.

extra_info has the milliseconds of processor time of the best round, which other programs disturb less than a clock; the ratio
of two ways in one run is what counts. UMT_BENCH_ROUNDS: 5.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from umt_fast.data.decode import classification_crops as crops_of
from umt_fast.data.decode.classification_frames import KineticsSparse
from umt_fast.data.decode.multi_view import MultiViewReader
from umt_fast.data.decode.video import Chooser, Pictures, decode_frames, iterate_frames

VIDEOS = Path(os.environ.get("UMT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "videos"
ROUNDS = int(os.environ.get("UMT_BENCH_ROUNDS", "5"))
COUNTS = {"test.mp4": 300, "demo.mp4": 280, "part_0.mp4": 32}
RULE, FRAMES, SIZE, SEGMENTS, CROPS = KineticsSparse(), 8, 224, 4, 3


def one(path: Path) -> np.ndarray:
    return crops_of.validation_view(decode_frames(path, lambda count: RULE.validation(count, FRAMES)), SIZE)[None]


def one_from_all(path: Path) -> np.ndarray:
    wanted, made, pictures = RULE.validation(COUNTS[path.name], FRAMES).tolist(), Pictures(), {}
    for number, frame in enumerate(iterate_frames(path)):
        if number in wanted:
            pictures[number] = made.of(frame)
        if number == wanted[-1]:
            break
    return crops_of.validation_view(np.stack([pictures[number] for number in wanted]), SIZE)[None]


def decoded_one(path: Path) -> np.ndarray:
    return decoded(path, lambda count: RULE.validation(count, FRAMES))


def decoded_twelve(path: Path) -> np.ndarray:
    return decoded(path, MultiViewReader(RULE, FRAMES, SIZE, SEGMENTS, CROPS).plan())


def decoded(path: Path, choose: Chooser) -> np.ndarray:
    nothing = np.empty((0, 0, 3), np.uint8)
    with mock.patch.object(Pictures, "of", lambda made, frame: nothing):
        return decode_frames(path, choose)


def twelve(path: Path) -> np.ndarray:
    return MultiViewReader(RULE, FRAMES, SIZE, SEGMENTS, CROPS).read(path)


def twelve_apart(path: Path) -> np.ndarray:
    views = []
    for segment in range(SEGMENTS):
        for crop in range(CROPS):
            frames = decode_frames(path, lambda count, s=segment: RULE.test(count, FRAMES, SEGMENTS, s))
            sized = crops_of.short_side_resized(frames, SIZE)
            views.append(crops_of.cut(sized, crops_of.test_window(*sized.shape[1:3], CROPS, crop)))
    return np.stack(views)


WAYS = (one, twelve, one_from_all, decoded_one, decoded_twelve, twelve_apart)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_views_of_a_video(benchmark, way, name: str) -> None:
    if not VIDEOS.is_dir():
        pytest.skip(f"no videos at {VIDEOS}; set UMT_SHARED")
    spent = []

    def timed() -> np.ndarray:
        before = time.process_time()
        found = way(VIDEOS / name)
        spent.append(time.process_time() - before)
        return found

    views = benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1)
    if way in (one, one_from_all):
        assert np.array_equal(views, one(VIDEOS / name)) and views.shape == (1, FRAMES, SIZE, SIZE, 3)
    elif way in (twelve, twelve_apart):
        assert views.shape == (SEGMENTS * CROPS, FRAMES, SIZE, SIZE, 3)
    if way is twelve_apart:
        assert np.array_equal(views, twelve(VIDEOS / name))
    benchmark.extra_info["ms"] = round(1000 * min(spent), 1)
