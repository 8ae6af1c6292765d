"""All test views of a video from one decode: segments in time, crops in space.

The official reader opens and decodes a video once for each view, 12 times for 4 segments x 3 crops. Here the frames of all
segments are listed first, decoded in one pass and resized once; views are cut from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from umt_fast.data.decode.classification_crops import cut, resizer, short_side_size, test_window
from umt_fast.data.decode.classification_frames import FrameRule
from umt_fast.data.decode.video import decode_pictures, read_frame_folder


class FramesOfViews(NamedTuple):
    """wanted: int64 (F,), ascending, each frame that some segment shows, once. segments: int64 (segments, T), where in `wanted`
    each segment's frames stand, in the segment's order."""

    wanted: np.ndarray
    segments: np.ndarray


def frames_of_views(rule: FrameRule, num_frames: int, count: int, segments: int) -> FramesOfViews:
    """The frames of all test segments of a video of num_frames frames, `count` a segment. Raises ValueError, as rules do."""
    asked = np.stack([rule.test(num_frames, count, segments, segment) for segment in range(segments)])
    wanted, position = np.unique(asked, return_inverse=True)
    return FramesOfViews(wanted, position.reshape(asked.shape))


@dataclass(frozen=True, slots=True)
class MultiViewReader:
    """Reads the test views of one video after another. Picklable and without state."""

    rule: FrameRule
    num_frames: int
    """Frames of a view."""
    size: int
    """Height and width of a view in pixels."""
    segments: int
    crops: int

    def __post_init__(self) -> None:
        for name in ("num_frames", "size", "segments", "crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        # A rule may have fewer segments: said before a video is read.
        self.rule.test(self.num_frames, self.num_frames, self.segments, self.segments - 1)

    @property
    def num_views(self) -> int:
        return self.segments * self.crops

    def read(self, path: str | Path, num_frames: int | None = None) -> np.ndarray:
        """The views of a video file, uint8 (segments * crops, T, size, size, 3); view s * crops + c is crop c of segment s.

        num_frames: the decodable count, if known; else packets are counted. Raises VideoError, as decode_frames does.
        """
        plan = self.plan()
        return self.views(decode_pictures(path, plan, num_frames), plan.frames)

    def read_folder(self, folder: str | Path, num_frames: int, pattern: str) -> np.ndarray:
        """The same of a folder of num_frames pictures; see video.read_frame_folder."""
        plan = self.plan()
        return self.views(read_frame_folder(folder, plan, num_frames, pattern), plan.frames)

    def plan(self) -> Plan:
        """What chooses the frames of one video, whose `frames` then say where each segment's are."""
        return Plan(self)

    def views(self, pictures: Sequence[np.ndarray], frames: FramesOfViews) -> np.ndarray:
        """The views as `read` gives them, of the F chosen pictures, each uint8 (h, w, 3)."""
        source = pictures[0].shape[:2]
        size = short_side_size(*source, self.size)
        resize, sized = resizer(source, size), np.empty((*size, 3), np.uint8)
        out = np.empty((self.num_views, self.num_frames, self.size, self.size, 3), np.uint8)
        windows = [test_window(*size, self.crops, crop) for crop in range(self.crops)]
        places: list[list[tuple[int, int]]] = [[] for _ in pictures]
        for segment, row in enumerate(frames.segments.tolist()):
            for moment, place in enumerate(row):
                places[place].append((segment * self.crops, moment))
        # Picture by picture: a resized one is still in the processor's cache when the views are cut from it.
        for picture, shown in zip(pictures, places, strict=True):
            resize(picture, sized)
            for crop, window in enumerate(windows):
                cut_out = cut(sized[None], window)[0]
                for first, moment in shown:
                    out[first + crop, moment] = cut_out
        return out


class Plan:
    """Chooses frames, and remembers for which count it was asked last: damage may make the decoder ask again."""

    frames: FramesOfViews

    def __init__(self, reader: MultiViewReader) -> None:
        self._reader = reader

    def __call__(self, count: int) -> np.ndarray:
        self.frames = frames_of_views(self._reader.rule, count, self._reader.num_frames, self._reader.segments)
        return self.frames.wanted
