"""Fine-tuning for retrieval (and multiple choice): contrastive and matching losses over whole clips, frame by frame.

Unlike stage 2 nothing is masked and no teacher runs. A clip's similarity with a text is the mean over frames of the cosines
of each frame's pooled vector; the matching head reads the tokens of all frames as one sequence. Legend: B pairs, l text
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from umt_fast.config import AttentionBackend, TextConfig, VitConfig
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.weights import load_retrieval
from umt_fast.tasks import video_text_losses as vision_text


def match_ids(keys: Sequence[str]) -> Tensor:
    """int64 (N,), equal where keys are: numbers in the order of first appearance.

    Officially the key is a clip's file name without folders or, where several clips share a caption (SSV2), the caption as
    the list has it.
    """
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def retrieval_losses(
    model: RetrievalModel,
    *,
    video: Tensor,
    ids: Tensor,
    mask: Tensor,
    index: Tensor,
    seed: Tensor,
    vtc: float = 1.0,
    vtm: float = 1.0,
    negatives: tuple[Tensor, Tensor] | None = None,
    rank: int = 0,
    gather: Literal["official", "full"] = "official",
) -> dict[str, Tensor]:
    """The losses of one batch of clips with their texts.

    Args:
        video: uint8 (B, T, H, W, 3), or normalized (B, 3, T, H, W).
        ids, mask: int64 (B, l) text with the class token first, and bool (B, l), False at padding.
        index: int64 (B,), equal for rows that are right answers of each other (see match_ids).
        seed: int64 (1,), draws the hard negatives unless they are given.
        vtc, vtm: weights of the losses; one of weight 0 is not computed.
        negatives: (clip of each text, text of each clip), int64 (B,) each, rows of this rank.
        rank: this rank's place among the gathered rows.
        gather: see vision_text.contrastive_loss.

    The model's temperature is first brought into its bounds, in place.

    Returns:
        fp32 scalars: `loss`, the weighted sum, and `vtc`, `vtm` (detached) as far as their weights are not 0.
    """
    temperature, text, found = model.bound_temperature(), model.text_encoder, {}
    tokens, _ = model.vision_encoder.embed(video)
    plain = text.encode(ids, mask)
    frames = tokens.shape[1] // model.vision_encoder.encoder.grid.per_frame
    vision, caption = model.project_vision(model.vision_encoder.pool(tokens, frames)), model.project_text(plain)
    sim = vision_text.similarity(vision, caption, index, temperature, gather)
    if vtc:
        found["vtc"] = vision_text.contrastive_loss(sim)
    if vtm:
        clip_of, text_of = negatives or vision_text.draw_negatives(sim, seed, rank)
        # Groups of texts: matched, with a wrong text; last, the texts that ask a wrong clip.
        groups, masks = torch.stack([plain, plain[text_of], plain]), torch.stack([mask, mask[text_of], mask])
        judged = model.match(text.fuse(groups, masks, text.clip_keys(tokens), clip_of, asked=1))
        found["vtm"] = vision_text.matching_loss(judged[0], judged[2], judged[1])
    total = sum(weight * found[name] for name, weight in (("vtc", vtc), ("vtm", vtm)) if name in found)
    return {"loss": total} | {name: value.detach() for name, value in found.items()}


class RetrievalTuning(nn.Module):
    """batch of captioned clips -> loss. The whole model is trained and saved."""

    def __init__(
        self,
        vit: VitConfig,
        text: TextConfig,
        *,
        embed_dim: int,
        init: str = "",
        max_length: int = 32,
        dtype: Literal["fp32", "bf16"] = "fp32",
        attention: AttentionBackend = "auto",
        vtc: float = 1.0,
        vtm: float = 1.0,
        gather: Literal["official", "full"] = "official",
    ) -> None:
        """init: a stage-2 or fine-tuned file to start from; empty: untrained. max_length: text positions that flops_per_clip
        counts. dtype: what products are computed in. vtc, vtm, gather: see retrieval_losses."""
        super().__init__()
        if vtc < 0 or vtm < 0 or vtc + vtm == 0:
            raise ValueError(f"the losses' weights are vtc {vtc} and vtm {vtm}; give none below 0 and one above")
        self.vit, self.text, self.embed_dim, self.max_length = vit, text, embed_dim, max_length
        self.dtype, self.vtc, self.vtm, self.gather = dtype, vtc, vtm, gather
        self.model = RetrievalModel(vit, text, embed_dim=embed_dim)
        if init:
            load_retrieval(self.model, init)
        use_attention(self, attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official layout of fine-tuned retrieval models."""
        return self.model

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some parameters get no gradient: those that only a switched-off loss uses."""
        return min(self.vtc, self.vtm) == 0

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network: tower, text."""
        return [*self.model.vision_encoder.encoder.pieces(), *self.model.text_encoder.pieces()]

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """batch: `video`, `ids`, `mask` and `sample` (equal for right answers of each other), see retrieval_losses."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        with torch.autocast(batch["video"].device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return retrieval_losses(
                self.model,
                video=batch["video"],
                ids=batch["ids"],
                mask=batch["mask"],
                index=batch["sample"],
                seed=seed,
                vtc=self.vtc,
                vtm=self.vtm,
                rank=rank,
                gather=self.gather,
            )

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip and its text, forward and backward."""
        return flops.retrieval_flops(
            self.vit, self.text, length=self.max_length, embed_dim=self.embed_dim, fuses=self.vtm > 0
        )
