"""`random`: drawn uniformly over the whole clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from umt_fast.masking.base import MAX_SCORES, ClassAttention, Limit, TokenGrid, num_visible, register

if TYPE_CHECKING:
    from torch import Tensor


class Random:
    """Any tokens of a clip, without replacement; frames keep different numbers of them."""

    name = "random"
    rectangular, same_positions, needs_teacher = False, False, False

    def count(self, grid: TokenGrid, ratio: float) -> int:
        return num_visible(grid.size, ratio)

    def limit(self, grid: TokenGrid) -> Limit:
        return Limit(grid.size, MAX_SCORES, "a clip")

    def draw(
        self, batch: int, grid: TokenGrid, ratio: float, seed: Tensor, attention: ClassAttention | None = None
    ) -> Tensor:
        import torch

        import kernels

        scores = torch.ones(batch, grid.size, device=seed.device)
        return kernels.sample_visible(scores, num_visible(grid.size, ratio), seed)


register(Random())
