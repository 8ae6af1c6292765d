"""`tube`: the same positions, drawn uniformly, in every frame, as VideoMAE does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from umt_fast.masking.base import MAX_SCORES, ClassAttention, Limit, TokenGrid, flatten_frames, num_visible, register

if TYPE_CHECKING:
    from torch import Tensor


class Tube:
    """One draw of positions for all frames of a clip."""

    name = "tube"
    rectangular, same_positions, needs_teacher = True, True, False

    def count(self, grid: TokenGrid, ratio: float) -> int:
        return grid.frames * num_visible(grid.per_frame, ratio)

    def limit(self, grid: TokenGrid) -> Limit:
        return Limit(grid.per_frame, MAX_SCORES, "a frame")

    def draw(
        self, batch: int, grid: TokenGrid, ratio: float, seed: Tensor, attention: ClassAttention | None = None
    ) -> Tensor:
        import torch

        import kernels

        scores = torch.ones(batch, grid.per_frame, device=seed.device)
        tube = kernels.sample_visible(scores, num_visible(grid.per_frame, ratio), seed)
        return flatten_frames(tube.repeat_interleave(grid.frames, 0), grid.frames, grid.per_frame)


register(Tube())
