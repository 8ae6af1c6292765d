"""The frozen CLIP text tower, whose embeddings of captions losses.text_projection aligns to.

open_clip's layers under OpenAI's names (`token_embedding`, `transformer.resblocks.*`, `ln_final`, `text_projection`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import CLIP_TEXT_LENGTH, CLIP_TEXT_WORDS, TeacherConfig
from umt_fast.extras import packages_of
from umt_fast.models.weights import WeightsError, fit
from umt_fast.models.weights.clip import clip_state

# Of every text tower of this layout; the parameters do not tell it.
HEAD_WIDTH = 64
# What OpenAI's layout has of it.
_KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


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


def load_clip_text(config: TeacherConfig) -> ClipText:
    """The text tower that belongs to the teacher, from the same weights; its sizes are theirs.

    Raises WeightsError: no weights, weights of the visual tower alone, a text tower of another kind than CLIP's.
    """
    source, need = f"teacher.weights {config.weights}", "losses.text_projection needs"
    if config.weights == "untrained":
        raise WeightsError(f"{source}: {need} a trained CLIP; give ARCH:TAG or a file, or set it to 0")
    if ":" in config.weights and not Path(config.weights).exists():
        _check_plain_text(config.weights.partition(":")[0], need)
    state = {key: value for key, value in clip_state(config).items() if key.startswith(_KEYS)}
    try:
        vocabulary, width = state["token_embedding.weight"].shape
        length, output_dim = len(state["positional_embedding"]), state["text_projection"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{source} hold no CLIP text tower (token_embedding, text_projection), which {need}; give ARCH:TAG, or a file of "
            "the whole CLIP in OpenAI's or open_clip's layout, not its visual part"
        ) from error
    depth = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    found = {"words": vocabulary, "positions": length, "output_dim": output_dim, "width": width}
    if (
        vocabulary != CLIP_TEXT_WORDS
        or length < CLIP_TEXT_LENGTH
        or output_dim != config.output_dim
        or width % HEAD_WIDTH
    ):
        raise WeightsError(
            f"{source}: the text tower has {found}; {need} {CLIP_TEXT_WORDS} words, at least {CLIP_TEXT_LENGTH} positions, "
            f"teacher.output_dim {config.output_dim} and a width that is a multiple of {HEAD_WIDTH}"
        )
    text = ClipText(
        width=width,
        depth=depth,
        vocab_size=vocabulary,
        context_length=length,
        output_dim=output_dim,
        quick_gelu=config.activation == "quick_gelu",
    )
    fit(text.tower, {key: value.float() for key, value in state.items()}, f"the text tower of {source}")
    return text


def _check_plain_text(arch: str, need: str) -> None:
    """Refuses open_clip's text towers that have CLIP's names and compute something else."""
    with packages_of("train"):
        import open_clip

    text = (open_clip.get_model_config(arch) or {}).get("text_cfg", {})
    other = set(text) - {"context_length", "vocab_size", "width", "heads", "layers"}
    if other or text.get("width", 512) != HEAD_WIDTH * text.get("heads", 8):
        raise WeightsError(
            f"open_clip's {arch} has a text tower of another kind ({', '.join(sorted(other or text))}); {need} CLIP's own"
        )
