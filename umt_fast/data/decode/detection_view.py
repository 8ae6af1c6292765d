"""What training and testing see of a detection clip: its pixels and boxes resized, cropped, colored and mirrored together.

The official order: resize to a short side, random crop, hue, saturation and brightness, mirror; then the sides of boxes are
moved at random. Testing resizes alone, and widens the boxes. Every number is drawn first and then applied. OpenCV computes
the pixels, as officially: its bilinear filter is not Pillow's, and its hue has 180 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.decode import boxes as moves
from umt_fast.data.decode.boxes import Size
from umt_fast.data.errors import DataError
from umt_fast.data.sources.detections import KeyFrame

TEST_EXTENSION = (0.1, 0.05)
"""How much wider and taller detected boxes are made before their features are read."""
MAX_BOXES = 100
"""Boxes of a clip in training; of more a random choice is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRule:
    """How pictures are cut and colored; the defaults are the official ones."""

    short_side: int = 256
    crop: int = 224
    """Side of the square that training cuts out at random. Testing shows whole pictures."""
    hue: int = 10
    """Largest shift of OpenCV's hue, which has 180 steps."""
    saturation: int = 26
    brightness: int = 26
    """Largest shifts, of 255 steps."""
    mirror: float = 0.5
    """Probability."""

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.short_side:
            raise DataError(f"crop is {self.crop} pixels; it must lie in [1, short_side = {self.short_side}]")
        for name in ("hue", "saturation", "brightness"):
            if getattr(self, name) < 0:
                raise DataError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.mirror <= 1:
            raise DataError(f"mirror is {self.mirror}; a probability lies in [0, 1]")


class Draws(NamedTuple):
    """x, y: where in its range the crop lies, in [0, 1). hue, saturation, brightness: whole shifts. mirror: in [0, 1), below
    the rule's probability mirrors."""

    x: float
    y: float
    hue: int
    saturation: int
    brightness: int
    mirror: float


class View(NamedTuple):
    """frames: uint8 (T, h, w, 3). boxes: fp32 (N, 4) in its pixels."""

    frames: np.ndarray
    boxes: Tensor

    @property
    def size(self) -> Size:
        return self.frames.shape[2], self.frames.shape[1]


class Sample(NamedTuple):
    """A clip for the detector. index: of its key frame. labels: bool (N, classes), or scores: fp32 (N,)."""

    index: int
    frames: np.ndarray
    boxes: Tensor
    labels: Tensor | None
    scores: Tensor | None


def draw(rule: ViewRule, rng: np.random.Generator) -> Draws:
    """The numbers of one training view."""
    x, y = rng.random(), rng.random()
    shifts = (int(rng.integers(-most, most + 1)) for most in (rule.hue, rule.saturation, rule.brightness))
    return Draws(x, y, *shifts, rng.random())


def resized(frames: np.ndarray, boxes: Tensor, size: Size, short_side: int) -> View:
    """Frames, uint8 (T, H, W, 3), with their short side short_side pixels long (see boxes.short_side_size).

    boxes: in pixels of `size`, which need not be the frames' own: annotations may have been made on larger pictures.
    """
    new = moves.short_side_size(frames.shape[2], frames.shape[1], short_side)
    out = np.empty((len(frames), new[1], new[0], 3), np.uint8)
    cv2 = _opencv()
    for frame, target in zip(frames, out, strict=True):
        cv2.resize(np.ascontiguousarray(frame), new, target)
    return View(out, moves.resized(boxes, size, new))


def cropped(view: View, side: int, x: float, y: float) -> View:
    """A square of `side` pixels; x and y, in [0, 1), say where. Boxes outside become empty and stay.

    Raises ValueError: a picture smaller than the square.
    """
    width, height = view.size
    if side > min(width, height):
        raise ValueError(f"a crop of {side} pixels does not fit a picture of {width} x {height}; choose a smaller crop")
    left, top = int(x * (width - side)), int(y * (height - side))
    window = (left, top, left + side, top + side)
    return View(view.frames[:, top : top + side, left : left + side], moves.cropped(view.boxes, window))


def colored(frames: np.ndarray, hue: int, saturation: int, brightness: int) -> np.ndarray:
    """Frames, uint8 (T, H, W, 3), shifted in OpenCV's HSV space: hue goes around, the other two are cut to [0, 255].

    Also without shifts the round trip changes pixels a little.
    """
    cv2 = _opencv()
    out = np.empty_like(frames, order="C")
    for frame, target in zip(frames, out, strict=True):
        pixels = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV).astype(np.int32)
        pixels[..., 0] = (pixels[..., 0] + hue + 180) % 180
        pixels[..., 1] = np.clip(pixels[..., 1] + saturation, 0, 255)
        pixels[..., 2] = np.clip(pixels[..., 2] + brightness, 0, 255)
        cv2.cvtColor(pixels.astype(np.uint8), cv2.COLOR_HSV2RGB, target)
    return out


def training_view(frames: np.ndarray, boxes: Tensor, size: Size, rule: ViewRule, draws: Draws) -> View:
    """A training view of frames, uint8 (T, H, W, 3), and their boxes, in pixels of `size`."""
    view = cropped(resized(frames, boxes, size, rule.short_side), rule.crop, draws.x, draws.y)
    view = View(colored(view.frames, draws.hue, draws.saturation, draws.brightness), view.boxes)
    if draws.mirror < rule.mirror:
        return View(np.ascontiguousarray(view.frames[:, :, ::-1]), moves.flipped(view.boxes, view.size))
    return view


def test_view(frames: np.ndarray, boxes: Tensor, size: Size, rule: ViewRule) -> View:
    """The whole picture, resized; boxes are not widened yet."""
    return resized(frames, boxes, size, rule.short_side)


test_view.__test__ = False  # type: ignore[attr-defined]


def training_sample(
    index: int, key: KeyFrame, frames: np.ndarray, rule: ViewRule, rng: np.random.Generator, max_boxes: int = MAX_BOXES
) -> Sample:
    """A random view, its boxes moved at random; of more than max_boxes boxes a random choice."""
    view = training_view(frames, key.boxes, key.size, rule, draw(rule, rng))
    boxes, labels = view.boxes, key.labels
    if len(boxes) > max_boxes:
        some = torch.from_numpy(rng.permutation(len(boxes))[:max_boxes])
        boxes, labels = boxes[some], labels[some]
    uniform = torch.from_numpy(rng.random((len(boxes), 4), np.float32))
    return Sample(index, view.frames, moves.jittered(boxes, view.size, uniform), labels, None)


def test_sample(
    index: int, key: KeyFrame, frames: np.ndarray, rule: ViewRule, share: tuple[float, float] = TEST_EXTENSION
) -> Sample:
    """The whole picture with all detected boxes, widened by a share of their width and height."""
    view = test_view(frames, key.boxes, key.size, rule)
    return Sample(index, view.frames, moves.extended(view.boxes, view.size, share), None, key.scores)


test_sample.__test__ = False  # type: ignore[attr-defined]


def padded(clips: Sequence[np.ndarray], multiple: int = 16) -> tuple[Tensor, Tensor]:
    """Clips, uint8 (T, h, w, 3) each, in one batch.

    Returns uint8 (B, T, H, W, 3), zero at right and bottom, where H and W are the largest height and width, rounded up to a
    multiple; and int64 (B, 2), each clip's own height and width. Padding is zero after normalization: see models.detector.
    """
    sizes = torch.tensor([clip.shape[1:3] for clip in clips])
    height, width = (-(-side // multiple) * multiple for side in sizes.amax(0).tolist())
    video = torch.zeros(len(clips), len(clips[0]), height, width, 3, dtype=torch.uint8)
    for clip, target in zip(clips, video, strict=True):
        target[:, : clip.shape[1], : clip.shape[2]] = torch.from_numpy(np.ascontiguousarray(clip))
    return video, sizes


def batched(samples: Sequence[Sample], *, multiple: int = 16, boxes_per_clip: int | None = None) -> dict[str, Tensor]:
    """Samples, all of training or all of testing, as a batch of the detector.

    Args:
        multiple: of pixels that sides are padded to; the tower's patch.
        boxes_per_clip: every clip gets so many rows, whatever it holds, so that shapes never change; None: those there are.

    Returns:
        index int64 (B,); video and sizes as `padded` gives them; boxes fp32 (N, 4); box_clip int64 (N,), ascending; box_valid
        bool (N,), the padding mask: false for rows that fill up, whose boxes and labels are zero; labels bool (N, classes) or
        scores fp32 (N,).

    Raises ValueError: a clip with more boxes than fit.
    """
    video, sizes = padded([sample.frames for sample in samples], multiple)
    counts = [len(sample.boxes) for sample in samples]
    rows = counts if boxes_per_clip is None else [boxes_per_clip] * len(samples)
    if any(count > room for count, room in zip(counts, rows, strict=True)):
        raise ValueError(
            f"a clip has {max(counts)} boxes, and there is room for {boxes_per_clip} a clip; raise boxes_per_clip, or give "
            "training_sample a smaller max_boxes"
        )

    def filled(parts: list[Tensor]) -> Tensor:
        padding = [room - len(part) for part, room in zip(parts, rows, strict=True)]
        pairs = zip(parts, padding, strict=True)
        return torch.cat([piece for part, n in pairs for piece in (part, part.new_zeros(n, *part.shape[1:]))])

    name = "labels" if samples[0].labels is not None else "scores"
    return {
        "index": torch.tensor([sample.index for sample in samples]),
        "video": video,
        "sizes": sizes,
        "boxes": filled([sample.boxes for sample in samples]),
        "box_clip": torch.arange(len(samples)).repeat_interleave(torch.tensor(rows)),
        "box_valid": filled([torch.ones(count, dtype=torch.bool) for count in counts]),
        name: filled([getattr(sample, name) for sample in samples]),
    }


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise DataError("detection clips are resized by OpenCV; pip install 'umt_fast[detection]'") from error
    cv2.setNumThreads(0)  # parallelism is over clips
    return cv2
