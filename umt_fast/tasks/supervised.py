"""Supervised classification of clips: fine-tuning and linear probes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import FinetuneConfig
from umt_fast.models.attention import use_attention
from umt_fast.models.classifier import Classifier
from umt_fast.models.weights import load_encoder


class Supervised(nn.Module):
    """batch with labels -> loss and top-1 accuracy."""

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = Classifier(config.student, config.num_classes, config.head_scale)
        if config.init:
            load_encoder(self.classifier, config.init)
        if config.freeze:
            for name, parameter in self.classifier.named_parameters():
                parameter.requires_grad_(name.startswith(("fc_norm.", "head.")))
        use_attention(self, config.run.attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official classifier layout."""
        return self.classifier

    def layer_id(self, name: str) -> int:
        """0 for the patch embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.config.student.depth + 1

    def logits(self, video: Tensor) -> Tensor:
        """(B, num_classes) fp32."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.config.run.dtype == "bf16"):
            return self.classifier(video).float()

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network."""
        return self.classifier.pieces()

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """batch: `video` as in pre-training; `label`, int64 (B,) classes or floating (B, num_classes) probabilities, which
        are taken as they are, without label_smoothing. Returns fp32 scalars `loss` and `top1` (a share)."""
        logits, label = self.logits(batch["video"]), batch["label"]
        if label.is_floating_point():
            loss, label = F.cross_entropy(logits, label), label.argmax(1)
        else:
            loss = F.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "top1": (logits.detach().argmax(1) == label).float().mean()}

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip, forward and backward (forward alone through frozen blocks)."""
        vit, n = self.config.student, self.classifier.grid.size
        span = n if vit.attention == "joint" else n // self.classifier.grid.frames
        block = n * vit.width**2 * (8 + 4 * vit.mlp_ratio) + 4 * n * span * vit.width
        patch = n * vit.width * 6 * vit.tubelet_size * vit.patch_size**2
        passes = 1 if self.config.freeze else 3
        return passes * vit.depth * block + min(passes, 2) * patch
