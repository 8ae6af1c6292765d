"""Random erasing (arXiv 1708.04896) of a clip: a box, the same in all frames, becomes noise.

Boxes are drawn beside the decoding and travel as four numbers each. What fills them is drawn in normalized values, so the
device does that after it has normalized the pixels. The official fine-tuning draws one box and a standard normal for each
value (mode `pixel` of timm).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

AREA = (0.02, 1 / 3)
"""Share of the picture that a box covers, uniform."""
ASPECT = (0.3, 1 / 0.3)
"""Its height over its width, log-uniform."""
_TRIES = 100


def draw_box(height: int, width: int, probability: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) in pixels, or (0, 0, 0, 0) where nothing is erased.

    A box that is as tall or as wide as the picture is drawn again, a hundred times at most.
    """
    return draw_boxes(height, width, probability, 1, rng)[0]


def draw_boxes(
    height: int, width: int, probability: float, count: int, rng: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """`count` boxes as draw_box gives them, each of so much less area; nothing, or all of them, is erased."""
    if rng.random() >= probability:
        return [(0, 0, 0, 0)] * count
    return [_box(height, width, count, rng) for _ in range(count)]


def _box(height: int, width: int, count: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(_TRIES):
        area = rng.uniform(*AREA) * height * width / count
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if tall < height and wide < width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            return int(top), int(left), tall, wide
    return 0, 0, 0, 0


def erased(video: Tensor, box: Tensor, noise: Tensor) -> Tensor:
    """The clips with noise inside their boxes.

    Args:
        video: normalized (B, 3, T, H, W).
        box: integers (B, 4) as draw_box gives them, or (B, count, 4) as draw_boxes does; one without area erases nothing.
        noise: of a shape that broadcasts to video's, and its dtype.
    """
    box = box.view(len(box), -1, 4, 1, 1)
    top, left, tall, wide = box.unbind(2)
    y = torch.arange(video.shape[3], device=video.device).view(1, -1, 1)
    x = torch.arange(video.shape[4], device=video.device).view(1, 1, -1)
    inside = ((y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)).any(1)
    return torch.where(inside[:, None, None], noise, video)


def noise_of(video: Tensor, mode: Literal["pixel", "color", "black"]) -> Tensor:
    """What fills boxes of normalized (B, 3, T, H, W), from the device's default generator; it broadcasts to video's shape.

    pixel: a normal draw for every value; color: one for each frame and channel; black: zeros.
    """
    if mode == "pixel":
        return torch.randn_like(video)
    drawn = video.new_empty(*video.shape[:3], 1, 1)
    return drawn.normal_() if mode == "color" else drawn.zero_()
