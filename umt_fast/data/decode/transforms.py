"""Crops and flips of a clip: every number is drawn first, once for all frames, then applied.

The multi-scale crop follows the official stage-1 augmentation (facts of its implementation, not its code): a window of
short side * {1, .875, .75, .66} per axis, the two axes at most one scale apart, at one of 13 fixed places.

How a window is resized belongs to how it is cut. Stage 1 resizes as Pillow does (bilinear, the filter widened when shrinking).
Stage 2 and retrieval resize as torchvision 0.13 does with uint8 tensors: bicubic, 4 x 4 pixels whatever the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from umt_fast.extras import packages_of

if TYPE_CHECKING:
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
    bicubic: bool = False
    """Resized by torchvision's bicubic filter for tensors, without antialiasing; else by Pillow's bilinear one."""


def crop_sizes(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """The (width, height) pairs a multi-scale crop may take of a width x height frame."""
    base = min(width, height)
    sides = [int(base * scale) for scale in SCALES]
    sides = [size if abs(side - size) < _SNAP else side for side in sides]
    # A frame a pixel or two below the wanted size must not be asked for more than it has.
    pairs = [(sides[i], sides[j]) for j in range(4) for i in range(4) if abs(i - j) <= 1]
    return [(min(w, width), min(h, height)) for w, h in pairs]


def crop_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """The 13 (left, top) places of a crop: corners, edge middles, center, quarter points."""
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


def random_resized_crop(
    width: int,
    height: int,
    flip: bool,
    rng: np.random.Generator,
    areas: tuple[float, float] = (0.5, 1.0),
    aspects: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """A window of 50 to 100% of the area, aspect 3/4 to 4/3 (log-uniform), as stage 2 crops, or of other limits.

    Where ten draws do not fit: the largest centered window of an allowed aspect (width over height).
    """
    mirrored = bool(flip and rng.random() < 0.5)
    for _ in range(10):
        area = width * height * rng.uniform(*areas)
        aspect = np.exp(rng.uniform(*np.log(aspects)))
        crop_width, crop_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
            return Crop(int(left), int(top), crop_width, crop_height, mirrored, bicubic=True)
    crop_width, crop_height = min(width, round(height * aspects[1])), min(height, round(width / aspects[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return Crop(left, top, crop_width, crop_height, mirrored, bicubic=True)


def whole(width: int, height: int) -> Crop:
    """The whole frame, pressed into a square: the official view of retrieval."""
    return Crop(0, 0, width, height, bicubic=True)


def center_crop(width: int, height: int) -> Crop:
    """The largest centered square: short side to the wanted size, then a center crop, in one resize."""
    side = min(width, height)
    return Crop((width - side) // 2, (height - side) // 2, side, side)


def apply(frames: np.ndarray | Sequence[Image.Image], crop: Crop, size: int) -> np.ndarray:
    """T pictures, uint8 (T, H, W, 3) or Pillow's of one size -> uint8 (T, size, size, 3), resized as the crop says."""
    right, bottom = crop.left + crop.width, crop.top + crop.height
    if isinstance(frames, np.ndarray):
        windows = frames[:, crop.top : bottom, crop.left : right]
    else:
        windows = [frame.crop((crop.left, crop.top, right, bottom)) for frame in frames]
    resized = (crop.height, crop.width) != (size, size)
    if resized and crop.bicubic:
        stacked = windows if isinstance(windows, np.ndarray) else np.stack([np.asarray(window) for window in windows])
        windows, resized = bicubic(torch.from_numpy(stacked), size).numpy(), False
    out = np.empty((len(frames), size, size, 3), np.uint8)
    if resized or crop.flip:
        with packages_of("video"):
            from PIL import Image
    for number, window in enumerate(windows):
        if (resized or crop.flip) and not isinstance(window, Image.Image):
            window = Image.fromarray(window)
        if resized:
            window = window.resize((size, size), Image.Resampling.BILINEAR)
        if crop.flip:
            # Three times as fast as numpy copies backwards.
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[number] = window
    return out


def bicubic(frames: Tensor, size: int) -> Tensor:
    """uint8 (T, h, w, 3) -> uint8 (T, size, size, 3) on its device: convolved in float32, clamped, rounded half to even.

    Torch's kernel for uint8 is faster and another function: it rounds and clamps between the two axes.
    """
    planes = frames.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    sized = interpolate(planes, (size, size), mode="bicubic", align_corners=False).clamp_(0, 255).round_()
    out = torch.empty((len(frames), size, size, 3), dtype=torch.uint8, device=frames.device)
    out.permute(0, 3, 1, 2).copy_(sized)
    return out
