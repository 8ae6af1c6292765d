"""`semantic`: drawn frame by frame from the teacher's class-token attention (paper section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from umt_fast.masking.base import MAX_TOKENS, ClassAttention, Limit, TokenGrid, flatten_frames, num_visible, register

if TYPE_CHECKING:
    from torch import Tensor


class Semantic:
    """As many tokens of each frame, without replacement, likelier where the class token looks."""

    name = "semantic"
    rectangular, same_positions, needs_teacher = True, False, True

    def count(self, grid: TokenGrid, ratio: float) -> int:
        return grid.frames * num_visible(grid.per_frame, ratio)

    def limit(self, grid: TokenGrid) -> Limit:
        return Limit(grid.per_frame, MAX_TOKENS, "a frame")

    def draw(
        self, batch: int, grid: TokenGrid, ratio: float, seed: Tensor, attention: ClassAttention | None = None
    ) -> Tensor:
        import kernels

        if attention is None:
            raise ValueError("mask kind 'semantic' is drawn from a teacher's attention; without one choose 'tube'")
        kept = kernels.semantic_mask(attention.query, attention.keys, num_visible(grid.per_frame, ratio), seed)
        return flatten_frames(kept, grid.frames, grid.per_frame)


register(Semantic())
