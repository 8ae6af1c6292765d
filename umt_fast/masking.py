"""The token grid of a clip and the three ways to choose its visible tokens.

Legend: B clips, T token frames, L tokens per frame, N = T * L tokens per clip, n visible tokens per clip.
A flat index runs frame-major, then rows, then columns, as in the official implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from umt_fast.config import MaskKind


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """T x rows x columns tokens of one clip."""

    frames: int
    rows: int
    columns: int

    @classmethod
    def of(cls, *, num_frames: int, tubelet_size: int, image_size: int, patch_size: int) -> TokenGrid:
        """The grid of a square clip of num_frames frames of image_size pixels."""
        side = image_size // patch_size
        return cls(num_frames // tubelet_size, side, side)

    @property
    def per_frame(self) -> int:
        return self.rows * self.columns

    @property
    def size(self) -> int:
        return self.frames * self.per_frame


def num_visible(tokens: int, mask_ratio: float) -> int:
    """tokens - int(tokens * mask_ratio): the official rounding (196 tokens at 0.8 leave 40)."""
    return tokens - int(tokens * mask_ratio)


def visible_per_clip(kind: MaskKind, grid: TokenGrid, mask_ratio: float) -> int:
    """n, the visible tokens of one clip; `random` rounds over the clip, the others over each frame."""
    if kind == "random":
        return num_visible(grid.size, mask_ratio)
    return grid.frames * num_visible(grid.per_frame, mask_ratio)


def flatten_frames(visible: Tensor, frames: int, per_frame: int) -> Tensor:
    """Per-frame indices (B*T, m) in [0, L) -> flat clip indices (B, T*m) int32, still ascending."""
    rows = visible.view(-1, frames, visible.shape[-1])
    offset = torch.arange(frames, device=visible.device, dtype=torch.int32) * per_frame
    return (rows + offset[:, None]).flatten(1)


# 2^64 over the golden ratio: its multiples lie far apart.
_STRIDE = 0x9E3779B97F4A7C15


def seed_of_view(seed: Tensor, view: int) -> Tensor:
    """The seed int64 (1,) of a clip's mask by its index: that of index 0 is `seed` itself."""
    wrapped = (view * _STRIDE + 2**63) % 2**64 - 2**63
    return seed + wrapped if view else seed


def draw_uniform(kind: MaskKind, batch: int, grid: TokenGrid, mask_ratio: float, seed: Tensor) -> Tensor:
    """Visible flat indices (B, n) int32, ascending, of a `random` or `tube` mask.

    seed: int64 (1,) on the device that is to hold the result. The draw is uniform without replacement.
    """
    if kind == "random":
        scores = torch.ones(batch, grid.size, device=seed.device)
        return kernels.sample_visible(scores, num_visible(grid.size, mask_ratio), seed)
    if kind == "tube":
        scores = torch.ones(batch, grid.per_frame, device=seed.device)
        tube = kernels.sample_visible(scores, num_visible(grid.per_frame, mask_ratio), seed)
        return flatten_frames(tube.repeat_interleave(grid.frames, 0), grid.frames, grid.per_frame)
    raise ValueError(f"mask kind {kind!r} is not drawn uniformly; choose 'random' or 'tube'")
