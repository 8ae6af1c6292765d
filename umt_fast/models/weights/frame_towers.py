"""Image weights for towers over frames: a patch embedding for tubelets, a position table for another resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inflated(weight: Tensor, tubelet_size: int) -> Tensor:
    """A 2-D patch weight (C, 3, p, p) as a 3-D one: it sits at the middle frame of the tubelet, which is the official rule.
    A 3-D one stays."""
    if weight.ndim != 4:
        return weight
    found = torch.zeros(*weight.shape[:2], tubelet_size, *weight.shape[2:])
    found[:, :, tubelet_size // 2] = weight
    return found


def resized_positions(table: Tensor, positions: int) -> Tensor:
    """A position table (1 + side^2, C), the class token's row first, with its grid resized to `positions` rows in all:
    bicubic, without antialiasing, as officially. One that fits, or is of no square grid, stays."""
    if table.ndim != 2 or table.shape[0] == positions:
        return table
    old, new = round((table.shape[0] - 1) ** 0.5), round((positions - 1) ** 0.5)
    if old * old != table.shape[0] - 1:
        return table
    grid = table[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(0, 2)])
