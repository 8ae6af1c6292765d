"""Stage 2, one step: clips or images with captions through tower and text encoder to four losses (paper section 3.2).

What is computed once that the official step computes several times: the text layers run over plain and masked text
together; the fusion layers over matched, wrong-text, masked and wrong-clip pairs together; each clip's keys and values once
for each fusion layer; vocabulary logits at asked positions alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kernels
from umt_fast.config import Stage2Config, Stage2Losses
from umt_fast.models.clip_teacher import ClipTeacher
from umt_fast.models.multimodal import HEAD_EPS, VideoText
from umt_fast.models.weights import load_bert, load_teacher, load_tower
from umt_fast.objectives import vision_text
from umt_fast.objectives.unmasked_alignment import UnmaskedAlignment


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
    tokens, heads = model.vision_encoder.embed(video, visible, heads=targets is not None and losses.uta > 0)
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


class VideoTextPretraining(nn.Module):
    """batch of captioned clips -> loss. The model is trained and saved; the CLIP teacher is frozen."""

    def __init__(self, config: Stage2Config, *, mask_id: int, special: tuple[int, ...]) -> None:
        """mask_id and special: the tokenizer's [MASK], and the ids that are never hidden."""
        super().__init__()
        self.config, self.mask_id, self.special = config, mask_id, special
        vit, layers = config.student, config.align.num_layers
        self.model = VideoText(
            vit, config.text, num_layers=layers, output_dim=config.teacher.output_dim, embed_dim=config.embed_dim
        )
        self.teacher = ClipTeacher(config.teacher, layers, vit.tubelet_size)
        load_teacher(self.teacher, config.teacher)
        if config.init:
            load_tower(self.model.vision_encoder, config.init)
        if config.bert != "untrained":
            load_bert(self.model.text_encoder, config.bert)
        if config.run.dtype == "bf16":
            self.teacher.compute_in(torch.bfloat16)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official stage-2 layout (without the frozen teacher)."""
        return self.model

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some parameters get no gradient: those that only a switched-off loss uses."""
        losses = self.config.losses
        return min(losses.vtc, losses.vtm, losses.mlm, losses.uta) == 0

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """batch: `video` as in stage 1, `ids`, `mask` and `sample` as CaptionLoader gives them. Returns stage2_losses'."""
        config, video = self.config, batch["video"]
        frames = video.shape[1] if video.dtype == torch.uint8 else video.shape[2]
        image = frames < config.student.num_frames
        target = self.teacher(video, config.image_mask if image else config.mask, seed)
        masked, labels = vision_text.mask_tokens(
            batch["ids"], batch["mask"], probability=config.mask_words, mask_id=self.mask_id,
            vocab_size=config.text.vocab_size, special=self.special,
        )  # fmt: skip
        with torch.autocast(video.device.type, torch.bfloat16, enabled=config.run.dtype == "bf16"):
            return stage2_losses(
                self.model, config.losses, video=video, visible=target.visible, ids=batch["ids"], mask=batch["mask"],
                index=batch["sample"], masked_ids=masked, labels=labels, seed=seed, targets=target.targets,
                rank=dist.get_rank() if dist.is_initialized() else 0,
                capacity=vision_text.masked_capacity(labels.numel(), config.mask_words),
            )  # fmt: skip

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip: teacher, tower, text (forward and backward three times forward)."""
        config = self.config
        text, vit = config.text, config.student
        tower = UnmaskedAlignment.flops_of(config)
        n = self.model.vision_encoder.encoder.grid.frames * (vit.image_size // vit.patch_size) ** 2
        n = n - int(n * config.mask.ratio)
        layer = 24 * config.max_length * text.width**2 + 4 * config.max_length**2 * text.width
        cross = 4 * config.max_length * text.width**2 + 4 * config.max_length * n * text.width
        keys = 4 * n * vit.width * text.width
        fusion = text.depth - text.fusion_layer
        return tower + 3 * (2 * text.fusion_layer * layer + fusion * (4 * (layer + cross) + keys))
