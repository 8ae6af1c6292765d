"""The frozen CLIP text tower, whose embeddings of captions losses.text_projection aligns to.

open_clip's layers under OpenAI's names (`token_embedding`, `transformer.resblocks.*`, `ln_final`, `text_projection`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.extras import packages_of

# Of every text tower of this layout; the parameters do not tell it.
HEAD_WIDTH = 64


class ClipText(nn.Module):
    """CLIP's text encoder, frozen: parameters take no gradient, forward records none."""

    def __init__(
        self, *, width: int, depth: int, vocab_size: int, context_length: int, output_dim: int, quick_gelu: bool
    ) -> None:
        # Here alone: no objective without text projection needs open_clip.
        with packages_of("train"):
            from open_clip.transformer import LayerNormFp32, QuickGELU, TextTransformer

        super().__init__()
        self.tower = TextTransformer(
            context_length,
            vocab_size,
            width,
            width // HEAD_WIDTH,
            depth,
            output_dim=output_dim,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
            norm_layer=LayerNormFp32,
        )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ClipText:
        """Stays in evaluation mode."""
        return super().train(False)

    def compute_in(self, dtype: torch.dtype) -> ClipText:
        """Casts the matrix weights once, as ClipTeacher.compute_in; LayerNorms and embeddings stay fp32."""
        with packages_of("train"):
            from open_clip.model import convert_weights_to_lp

        convert_weights_to_lp(self.tower, dtype)
        return self

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """int64 (B, l), each row a start token, word pieces, an end token, zeros -> unit embeddings (B, D), fp32.

        l may be anything up to the context length: attention is causal, so what follows the end token changes nothing.
        """
        tower, length = self.tower, ids.shape[1]
        x = (tower.token_embedding(ids) + tower.positional_embedding[:length]).to(tower.transformer.get_cast_dtype())
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        rows = torch.arange(len(ids), device=ids.device)
        # The end token has the largest id.
        x = tower.ln_final(x[rows, ids.argmax(1)]) @ tower.text_projection
        return F.normalize(x.float(), dim=-1)
