"""The student of pre-training: the ViT and its K alignment heads, under official parameter names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umt_fast.config import VitConfig
from umt_fast.models.linear import Linear
from umt_fast.models.vit import VisionTransformer, position_table


class AlignmentHead(nn.Module):
    """Linear and LayerNorm of one aligned layer. The norm's parameters live here; the loss kernel applies them."""

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        self.head = Linear(width, output_dim)
        self.norm = nn.LayerNorm(output_dim, eps=1e-6)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)


class Student(nn.Module):
    """Video and visible indices -> K head outputs (umt `encoder.*` and `clip_decoder.{k}.*`)."""

    def __init__(self, vit: VitConfig, num_layers: int, output_dim: int) -> None:
        super().__init__()
        self.encoder = VisionTransformer(vit)
        self.clip_decoder = nn.ModuleList(AlignmentHead(vit.width, output_dim) for _ in range(num_layers))
        # Built apart from the encoder's table of the same values: stage 2 gives the two different lengths.
        self.register_buffer("position", position_table(vit), persistent=False)

    @property
    def shard_units(self) -> list[nn.Module]:
        """The modules whose parameters are used in their own forward alone, in its order."""
        return self.encoder.shard_units

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """As VisionTransformer.pieces, and the heads."""
        return [*self.encoder.pieces(), (self, "heads")]

    @property
    def norm_weight(self) -> Tensor:
        """(K, D) LayerNorm weights of the heads."""
        return torch.stack([head.norm.weight for head in self.clip_decoder])

    @property
    def norm_bias(self) -> Tensor:
        """(K, D) LayerNorm biases of the heads."""
        return torch.stack([head.norm.bias for head in self.clip_decoder])

    def forward(self, video: Tensor, visible: Tensor) -> Tensor:
        """(K, B, n, D) outputs of the heads before their LayerNorm, or (K, B * M, n, D) of M views of each clip; see
        VisionTransformer.forward for the arguments."""
        features = self.encoder(video, visible, len(self.clip_decoder))
        position = self.position[visible]
        return self.heads(features, position, self.encoder.norm)

    def heads(self, features: Sequence[Tensor], position: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Taps (..., C), through `norm` if it is given, with their positions -> (K, ..., D)."""
        outputs = []
        for head, feature in zip(self.clip_decoder, features, strict=True):
            feature = feature if norm is None else norm(feature)
            outputs.append(head.head((feature + position).flatten(0, -2)))
        # Of matrices, a compiler lets the products write their rows of the result, and copies none.
        return torch.cat(outputs).view(len(outputs), *position.shape[:-1], -1)
