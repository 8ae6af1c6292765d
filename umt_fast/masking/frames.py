"""Indices within frames as indices within clips."""

from __future__ import annotations

import torch
from torch import Tensor


def flatten_frames(visible: Tensor, frames: int, per_frame: int) -> Tensor:
    """Per-frame indices (B*T, m) in [0, L) -> flat clip indices (B, T*m) int32, still ascending."""
    rows = visible.view(-1, frames, visible.shape[-1])
    offset = torch.arange(frames, device=visible.device, dtype=torch.int32) * per_frame
    return (rows + offset[:, None]).flatten(1)
