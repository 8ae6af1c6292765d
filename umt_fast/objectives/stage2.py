"""Stage 2, one step: clips or images with captions through tower and text encoder to four losses (paper section 3.2).

What is computed once that the official step computes several times: the text layers run over plain and masked text
together; the fusion layers over matched, wrong-text, masked and wrong-clip pairs together; each clip's keys and values once
for each fusion layer; vocabulary logits at asked positions alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from umt_fast.config import Stage2Losses
from umt_fast.models.multimodal import HEAD_EPS, VideoText
from umt_fast.objectives import vision_text


def stage2_losses(
    model: VideoText,
    losses: Stage2Losses,
    *,
    video: Tensor,
    visible: Tensor,
    ids: Tensor,
    mask: Tensor,
    index: Tensor,
    masked_ids: Tensor,
    labels: Tensor,
    seed: Tensor,
    targets: Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    rank: int = 0,
    capacity: int | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch of clips (or of images, as clips of one frame).

    Args:
        video: uint8 (B, T, H, W, 3), or normalised (B, 3, T, H, W).
        visible: int32 (B, n), the tokens the tower sees.
        ids, mask: int64 (B, l) text with the class token first, and bool (B, l), False at padding.
        index: int64 (B,), equal for rows of one sample.
        masked_ids, labels: as vision_text.mask_tokens makes them.
        seed: int64 (1,), draws the hard negatives unless they are given.
        targets: (K, B, n, D) teacher outputs at visible, for the alignment loss; None: that loss is left out.
        negatives: (clip of each text, text of each clip), int64 (B,) each, rows of this rank.
        rank: this rank's place among the gathered rows.
        capacity: most positions of a batch that masked-language logits are computed for; None: all of them.

    Returns:
        fp32 scalars: `loss`, the weighted sum, and `vtc`, `vtm`, `mlm`, `uta` (detached) as far as their weights are not 0.
    """
    text = model.text_encoder
    tokens, heads = model.vision_encoder.embed(video, visible, heads=targets is not None)
    both = text.encode(torch.cat([ids, masked_ids]), torch.cat([mask, mask]))
    plain, masked = both.chunk(2)
    found: dict[str, Tensor] = {}

    pooled = model.vision_encoder.pool(tokens)
    sim = vision_text.similarity(model.project_vision(pooled), model.project_text(plain), index, model.temperature)
    if losses.vtc:
        found["vtc"] = vision_text.contrastive_loss(sim)
    if losses.vtm or losses.mlm:
        clip_of, text_of = negatives or vision_text.draw_negatives(sim, seed, rank)
        # Groups of texts: matched, with a wrong text, masked; last, the texts that ask a wrong clip.
        groups = torch.stack([plain, plain[text_of], masked, plain])
        masks = torch.stack([mask, mask[text_of], mask, mask])
        fused = text.fuse(groups, masks, text.clip_keys(tokens), clip_of)
        if losses.vtm:
            found["vtm"] = vision_text.matching_loss(*(model.match(fused[group]) for group in (0, 3, 1)))
        if losses.mlm:
            rows, asked = vision_text.masked_rows(labels, capacity or labels.numel())
            logits = text.cls.predictions(fused[2].flatten(0, 1)[rows])
            found["mlm"] = vision_text.masked_language_loss(logits, asked)
    if targets is not None and losses.uta:
        tower = model.vision_encoder
        found["uta"] = kernels.align_loss(heads, targets, tower.norm_weight, tower.norm_bias, eps=HEAD_EPS)
    total = sum(getattr(losses, name) * value for name, value in found.items())
    return {"loss": total} | {name: value.detach() for name, value in found.items()}
