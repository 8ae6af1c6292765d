"""Random erasing (arXiv 1708.04896) of a clip: a box, the same in all frames, becomes noise.

The box is drawn beside the decoding and travels as four numbers. The noise is standard normal in normalized values, one draw a
value, so the device fills it in after it has normalized the pixels (mode `pixel` of timm, as the official fine-tuning has it).
"""

from __future__ import annotations

import math

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
    if rng.random() >= probability:
        return 0, 0, 0, 0
    for _ in range(_TRIES):
        area = rng.uniform(*AREA) * height * width
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
        box: integers (B, 4) as draw_box gives them; a box without area erases nothing.
        noise: of video's shape and dtype.
    """
    top, left, tall, wide = (column.view(-1, 1, 1) for column in box.unbind(1))
    y = torch.arange(video.shape[3], device=video.device).view(1, -1, 1)
    x = torch.arange(video.shape[4], device=video.device).view(1, 1, -1)
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    return torch.where(inside[:, None, None], noise, video)
