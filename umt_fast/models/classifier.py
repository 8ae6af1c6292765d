"""The fine-tuned classifier: all tokens, mean pooling, a fresh norm and a linear head (official names)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from umt_fast.config import VitConfig
from umt_fast.models.vit import VisionTransformer, draw_linear


def pretraining_grid(patch_size: int) -> tuple[int, int, int]:
    """Token frames, rows and columns of the official pre-training: 8 frames of 224 pixels, patches of 16 (or of 14)."""
    side = 16 if patch_size == 14 else 14
    return 8, side, side


class Classifier(VisionTransformer):
    """Clip -> logits. The pre-training norm is absent: mean pooling is followed by `fc_norm` instead.

    The position table is made for config.position_grid, by default the official pre-training's, and resized to the clip's.
    """

    def __init__(self, config: VitConfig, num_classes: int, head_scale: float = 0.001) -> None:
        config = replace(config, position_grid=config.position_grid or pretraining_grid(config.patch_size))
        super().__init__(config, with_norm=False)
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, num_classes)
        draw_linear(self)
        with torch.no_grad():
            self.head.weight.mul_(head_scale)

    def pooled(self, video: Tensor) -> Tensor:
        """(B, C) normed mean of all tokens of the last block."""
        (tokens,) = super().forward(video)
        return self.fc_norm(tokens.mean(1))

    def forward(self, video: Tensor) -> Tensor:
        """Video uint8 (B, T, H, W, 3) or normalized (B, 3, T, H, W) -> logits (B, num_classes)."""
        return self.head(self.pooled(video))
