"""Crops and flips of a clip: every number is drawn first, once for all frames, then applied.

The multi-scale crop follows the official stage-1 augmentation (facts of its implementation, not its code): a window of
short side * {1, .875, .75, .66} per axis, the two axes at most one scale apart, at one of 13 fixed places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SCALES = (1.0, 0.875, 0.75, 0.66)
# A side this close to the wanted size is taken as that size, which saves a resize.
_SNAP = 3


@dataclass(frozen=True, slots=True)
class Crop:
    """A window of the decoded frame in pixels, resized to the wanted size, then mirrored if `flip`."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


def crop_sizes(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """The (width, height) pairs a multi-scale crop may take of a width x height frame."""
    base = min(width, height)
    sides = [int(base * scale) for scale in SCALES]
    sides = [size if abs(side - size) < _SNAP else side for side in sides]
    # A frame a pixel or two below the wanted size must not be asked for more than it has.
    pairs = [(sides[i], sides[j]) for j in range(4) for i in range(4) if abs(i - j) <= 1]
    return [(min(w, width), min(h, height)) for w, h in pairs]


def crop_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """The 13 (left, top) places of a crop: corners, edge middles, centre, quarter points."""
    step_x, step_y = (width - crop_width) // 4, (height - crop_height) // 4
    cells = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    return [(x * step_x, y * step_y) for x, y in cells]


def multi_scale_crop(width: int, height: int, size: int, flip: bool, rng: np.random.Generator) -> Crop:
    """Draws a multi-scale crop and, if flip is on, mirrors it with probability one half."""
    sizes = crop_sizes(width, height, size)
    crop_width, crop_height = sizes[rng.integers(len(sizes))]
    offsets = crop_offsets(width, height, crop_width, crop_height)
    left, top = offsets[rng.integers(len(offsets))]
    return Crop(left, top, crop_width, crop_height, bool(flip and rng.random() < 0.5))


def random_resized_crop(width: int, height: int, flip: bool, rng: np.random.Generator) -> Crop:
    """A window of 50 to 100% of the area, aspect 3/4 to 4/3 (log-uniform), as stage 2 crops; the whole frame's centre if
    ten draws do not fit."""
    mirrored = bool(flip and rng.random() < 0.5)
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_width, crop_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
            return Crop(int(left), int(top), crop_width, crop_height, mirrored)
    crop_width, crop_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return Crop((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height, mirrored)


def center_crop(width: int, height: int) -> Crop:
    """The largest centred square: short side to the wanted size, then a centre crop, in one resize."""
    side = min(width, height)
    return Crop((width - side) // 2, (height - side) // 2, side, side)


def apply(frames: Sequence[np.ndarray] | Sequence[Image.Image], crop: Crop, size: int) -> np.ndarray:
    """T pictures, uint8 (H, W, 3) or Pillow's -> uint8 (T, size, size, 3), bilinear, the filter widened when shrinking, as
    PIL does."""
    out = np.empty((len(frames), size, size, 3), np.uint8)
    right, bottom = crop.left + crop.width, crop.top + crop.height
    for number, frame in enumerate(frames):
        if isinstance(frame, Image.Image):
            window = frame.crop((crop.left, crop.top, right, bottom))
        else:
            window = frame[crop.top : bottom, crop.left : right]
        resized = (crop.height, crop.width) != (size, size)
        if (resized or crop.flip) and not isinstance(window, Image.Image):
            window = Image.fromarray(window)
        if resized:
            window = window.resize((size, size), Image.Resampling.BILINEAR)
        if crop.flip:
            # Three times as fast as numpy copies backwards.
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[number] = window
    return out
