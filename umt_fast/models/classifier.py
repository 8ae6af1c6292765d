"""The fine-tuned classifier: all tokens, mean pooling, a fresh norm and a linear head (official names)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umt_fast.config import VitConfig
from umt_fast.models.vit import VisionTransformer


class Classifier(VisionTransformer):
    """Clip -> logits. The pre-training norm is absent: mean pooling is followed by `fc_norm` instead."""

    def __init__(self, config: VitConfig, num_classes: int, head_scale: float = 0.001) -> None:
        super().__init__(config, with_norm=False)
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
        with torch.no_grad():  # biases are zero already
            self.head.weight.mul_(head_scale)

    def pooled(self, video: Tensor) -> Tensor:
        """(B, C) normed mean of all tokens of the last block."""
        (tokens,) = super().forward(video)
        return self.fc_norm(tokens.mean(1))

    def forward(self, video: Tensor) -> Tensor:
        """Video uint8 (B, T, H, W, 3) or normalised (B, 3, T, H, W) -> logits (B, num_classes)."""
        return self.head(self.pooled(video))
