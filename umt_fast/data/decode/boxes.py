"""Boxes of people in a picture, as the official detection code moves them with the picture.

Boxes are fp32 (N, 4): left, top, right, bottom in pixels, the last pixel included: a box is right - left + 1 wide. They lie in
[0, size - 1]. All functions return new tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, int]
"""Width and height of a picture in pixels."""


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """Cut to the picture."""
    return torch.stack([column.clamp(0, size[n % 2] - 1) for n, column in enumerate(boxes.unbind(1))], 1)


def not_empty(boxes: Tensor) -> Tensor:
    """bool (N,): boxes that are more than a pixel wide and tall."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def from_xywh(boxes: Tensor) -> Tensor:
    """From left, top, width, height, as annotation files hold boxes."""
    corner, extent = boxes[:, :2], boxes[:, 2:]
    return torch.cat([corner, corner + (extent - 1).clamp_min(0)], 1)


def to_xywh(boxes: Tensor) -> Tensor:
    """To left, top, width, height."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2] + 1], 1)


def resized(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """With the picture from one size to another."""
    factor = torch.tensor([new[0] / old[0], new[1] / old[1]] * 2, dtype=boxes.dtype)
    return boxes * factor


def flipped(boxes: Tensor, size: Size) -> Tensor:
    """Mirrored from left to right."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([size[0] - right - 1, top, size[0] - left - 1, bottom], 1)


def cropped(boxes: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """Moved with a window (left, top, right, bottom, ends excluded) and cut to it. Boxes outside become empty; they stay."""
    origin = torch.tensor(window[:2] * 2, dtype=boxes.dtype)
    extent = (window[2] - window[0], window[3] - window[1])
    moved = boxes - origin
    return torch.stack([column.clamp(0, extent[n % 2]) for n, column in enumerate(moved.unbind(1))], 1)


def extended(boxes: Tensor, size: Size, share: tuple[float, float]) -> Tensor:
    """Larger by a share of width and height, half of it on each side, and cut to the picture."""
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    pad = torch.stack([float(part) * column / 2 for part, column in zip(share, extent.unbind(1), strict=True)], 1)
    return clipped(torch.cat([boxes[:, :2] - pad, boxes[:, 2:] + pad], 1), size)


OUTWARD, INWARD = (0.2, 0.1), (0.1, 0.05)
"""How far sides move in training at most, as shares of width and height."""


def jittered(boxes: Tensor, size: Size, uniform: Tensor) -> Tensor:
    """Each side moved at random, at least two pixels from the opposite one where the picture allows it.

    uniform: (N, 4), in [0, 1), for left, top, right, bottom: 0 moves left and top outward and right and bottom inward.
    """
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    out, inward = (torch.tensor(parts, dtype=boxes.dtype) for parts in (OUTWARD, INWARD))
    low = boxes[:, :2] + extent * (uniform[:, :2] * (inward + out) - out)
    high = boxes[:, 2:] + extent * (uniform[:, 2:] * (out + inward) - inward)
    last = torch.tensor(size, dtype=boxes.dtype) - 1
    low = torch.minimum(low.clamp_min(0), last - 1)
    high = torch.maximum(torch.minimum(high, last), low + 1)
    return clipped(torch.cat([low, high], 1), size)


def short_side_size(width: int, height: int, side: int) -> Size:
    """The size a picture is resized to so that its short side is `side` long.

    A picture whose short side is that already comes out with width and height exchanged, and its frames and boxes are
    stretched: so does the official code, and its models were trained that way.
    """
    if min(width, height) == side:
        return height, width
    if width < height:
        return side, int(side * height / width)
    return int(side * width / height), side
