"""The stage-2 model: vision tower, text encoder, the projections that meet, the matching head (official names).

Legend: B clips, n visible tokens, C and W vision and text width, E embedding width, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import TextConfig, VitConfig
from umt_fast.models.student import Student
from umt_fast.models.text import Bert, TextEncoder

# The alignment heads' LayerNorm in stage 2; stage 1 has 1e-6.
HEAD_EPS = 1e-5
# Bounds of the learned temperature.
TEMPERATURES = (0.001, 0.5)


class VisionTower(Student):
    """The stage-1 student with a norm for its pooled output. One clip, or an image as a clip of one frame."""

    def __init__(self, vit: VitConfig, num_layers: int, output_dim: int, *, pools: bool = True) -> None:
        """pools: False builds no pool_norm, for models that never pool."""
        super().__init__(vit, num_layers, output_dim)
        if pools:
            self.pool_norm = nn.LayerNorm(vit.width, eps=1e-6)

    def embed(
        self, video: Tensor, visible: Tensor | None = None, *, heads: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Video as for VisionTransformer (or one frame: an image), visible (B, n) or None for all its tokens.

        Returns the normed tokens (B, n, C) of the last block and, if `heads`, the alignment heads' outputs (K, B, n, D).
        """
        encoder = self.encoder
        if visible is None:
            frames = video.shape[1] if video.dtype == torch.uint8 else video.shape[2]
            tokens = frames // encoder.config.tubelet_size * encoder.grid.per_frame
            visible = encoder.every[:tokens].expand(video.shape[0], -1)
        features = encoder(video, visible, len(self.clip_decoder) if heads else 1)
        normed = [encoder.norm(feature) for feature in features]
        if not heads:
            return normed[-1], None
        position = self.position[visible]
        return normed[-1], self.heads(normed, position)

    def embed_packed(
        self, batches: Sequence[tuple[Tensor, Tensor]], *, heads: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        """What embed gives for each batch (video, visible), all through the tower at once: clips and images packed."""
        features, packing = self.encoder.packed(batches, len(self.clip_decoder) if heads else 1)
        normed = [self.encoder.norm(feature) for feature in features]
        tokens = packing.split(normed[-1])
        if not heads:
            return [(part, None) for part in tokens]
        position = torch.cat([self.position[visible].flatten(0, 1) for _, visible in batches])
        outputs = self.heads(normed, position)
        return list(zip(tokens, packing.split(outputs, 1), strict=True))

    def pool(self, tokens: Tensor, frames: int = 1) -> Tensor:
        """(B, frames, C): the normed mean of each of `frames` equal parts of the tokens; 1: of all."""
        return self.pool_norm(tokens.unflatten(1, (frames, -1)).mean(2))


class Matching(nn.Module):
    """A vision tower and a text encoder that are compared and matched: what stage 2 and fine-tuned retrieval share."""

    def __init__(
        self, vision: VisionTower, text: TextEncoder | Bert, *, embed_dim: int, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.vision_encoder = vision
        self.text_encoder = text
        self.vision_proj = nn.Linear(vision.encoder.config.width, embed_dim)
        self.text_proj = nn.Linear(text.config.width, embed_dim)
        self.itm_head = nn.Linear(text.config.width, 2)
        self.temp = nn.Parameter(torch.tensor(temperature))

    @property
    def shard_units(self) -> list[nn.Module]:
        """The modules whose parameters are used in their own forward alone: blocks of the tower and text layers.

        Not the fusion layers: clips' keys come from a part of theirs, before and apart from the rest.
        """
        return [*self.vision_encoder.shard_units, *self.text_encoder.text_layers]

    def bound_temperature(self) -> Tensor:
        """Moves the learned temperature itself into its official bounds, as every training step begins, and returns a copy
        for the losses. The official rule: of a value clamped in flight, one beyond the bounds would get no gradient any more.
        """
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURES)
        # Backward passes of earlier steps that are still to come do not see the next bounding.
        return self.temp.clone()

    @property
    def temperature(self) -> Tensor:
        """The learned temperature within its official bounds, for evaluation."""
        return self.temp.clamp(*TEMPERATURES)

    def project_vision(self, pooled: Tensor) -> Tensor:
        """Pooled vision (B, T or 1, C) -> unit vectors averaged over time (B, E), fp32."""
        return F.normalize(self.vision_proj(pooled).float(), dim=-1).mean(1)

    def project_text(self, text: Tensor) -> Tensor:
        """Text (B, l, W) -> the class token's unit vector (B, E), fp32."""
        return F.normalize(self.text_proj(text[:, 0]).float(), dim=-1)

    def match(self, fused: Tensor) -> Tensor:
        """Fused text (..., l, W) -> logits (..., 2), index 1: they match."""
        return self.itm_head(fused[..., 0, :])


class VideoText(Matching):
    """Everything stage 2 trains and saves."""

    def __init__(
        self,
        vit: VitConfig,
        text: TextConfig,
        *,
        num_layers: int,
        output_dim: int,
        embed_dim: int,
        temperature: float = 0.07,
    ) -> None:
        vision = VisionTower(vit, num_layers, output_dim)
        super().__init__(vision, TextEncoder(text, vit.width), embed_dim=embed_dim, temperature=temperature)
