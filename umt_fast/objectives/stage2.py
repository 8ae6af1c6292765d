"""Stage 2, one step: clips or images with captions through tower and text encoder to four losses (paper section 3.2).

What is computed once that the official step computes several times: the text layers run over plain and masked text
together; the fusion layers over matched, wrong-text, masked and wrong-clip pairs together; each clip's keys and values once
for each fusion layer. What is left out because nothing reads it: the last fusion layer at the pairs' other positions than the
class token, vocabulary logits at positions that are not asked.

A step may hold clips and images (packed co-training): they go through tower and text layers together; the losses are those
of each kind, negatives included, and the step's loss is their mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from umt_fast.config import Stage2Config, Stage2Losses
from umt_fast.models.attention import use_attention
from umt_fast.models.clip_teacher import ClipTeacher
from umt_fast.models.multimodal import HEAD_EPS, VideoText
from umt_fast.models.weights import load_bert, load_teacher, load_teacher_text, load_tower
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
    pairs = Pairs(video, visible, ids, mask, index, masked_ids, labels, seed, targets, negatives, capacity=capacity)
    return joint_losses(model, losses, [pairs], rank)


class Pairs(NamedTuple):
    """A batch of clips, or of images, with their captions; see stage2_losses for each.

    image, caption: fp32 (B, D) CLIP's embeddings of the clip and of its caption, for the alignment of the projected ones,
    or None.
    """

    video: Tensor
    visible: Tensor
    ids: Tensor
    mask: Tensor
    index: Tensor
    masked_ids: Tensor
    labels: Tensor
    seed: Tensor
    targets: Tensor | None = None
    negatives: tuple[Tensor, Tensor] | None = None
    image: Tensor | None = None
    caption: Tensor | None = None
    capacity: int | None = None


def joint_losses(model: VideoText, losses: Stage2Losses, batches: Sequence[Pairs], rank: int = 0) -> dict[str, Tensor]:
    """As stage2_losses, the mean of several batches: what the mean of their single steps would give, gradients too."""
    heads = losses.uta > 0 and all(pairs.targets is not None for pairs in batches)
    if len(batches) == 1:
        seen = [model.vision_encoder.embed(batches[0].video, batches[0].visible, heads=heads)]
    else:
        seen = model.vision_encoder.embed_packed([(pairs.video, pairs.visible) for pairs in batches], heads=heads)
    texts = _encode(model, batches)
    found: dict[str, Tensor] = {}
    for pairs, (tokens, outputs), (plain, masked) in zip(batches, seen, texts, strict=True):
        for name, value in _losses_of(model, losses, pairs, tokens, outputs, plain, masked, rank).items():
            found[name] = found.get(name, 0) + value / len(batches)
    total = sum(getattr(losses, name) * value for name, value in found.items())
    return {"loss": total} | {name: value.detach() for name, value in found.items()}


def _encode(model: VideoText, batches: Sequence[Pairs]) -> list[tuple[Tensor, Tensor]]:
    """Plain and masked text (B, l, W) of each batch, all in one pass, padded to the longest of all batches."""
    longest = max(pairs.ids.shape[1] for pairs in batches)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])

    ids = joined([pairs.ids for pairs in batches] + [pairs.masked_ids for pairs in batches])
    mask = joined([pairs.mask for pairs in batches] * 2)
    parts = model.text_encoder.encode(ids, mask).split([len(pairs.ids) for pairs in batches] * 2)
    every = zip(batches, parts[: len(batches)], parts[len(batches) :], strict=True)
    return [tuple(part[:, : pairs.ids.shape[1]] for part in both) for pairs, *both in every]


def _losses_of(
    model: VideoText, losses: Stage2Losses, pairs: Pairs, tokens: Tensor, heads: Tensor | None, plain: Tensor,
    masked: Tensor, rank: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The losses of one kind by name, from its vision tokens (B, n, C) and its plain and masked text (B, l, W)."""
    text, tower, found = model.text_encoder, model.vision_encoder, {}
    vision, caption = model.project_vision(tower.pool(tokens)), model.project_text(plain)
    sim = vision_text.similarity(vision, caption, pairs.index, model.temperature, losses.gather)
    if losses.vtc:
        found["vtc"] = vision_text.contrastive_loss(sim)
    if losses.vtm or losses.mlm:
        mask, labels = pairs.mask, pairs.labels
        clip_of, text_of = pairs.negatives or vision_text.draw_negatives(sim, pairs.seed, rank)
        # Groups of texts: masked, matched, with a wrong text; last, the texts that ask a wrong clip.
        groups = torch.stack([masked, plain, plain[text_of], plain])
        masks = torch.stack([mask, mask, mask[text_of], mask])
        filled, judged = text.fuse_for_losses(groups, masks, text.clip_keys(tokens), clip_of)
        if losses.vtm:
            found["vtm"] = vision_text.matching_loss(*(model.match(judged[group]) for group in (0, 2, 1)))
        if losses.mlm:
            rows, asked = vision_text.masked_rows(labels, pairs.capacity or labels.numel())
            logits = text.cls.predictions(filled.flatten(0, 1)[rows])
            found["mlm"] = vision_text.masked_language_loss(logits, asked)
    if heads is not None:
        found["uta"] = kernels.align_loss(heads, pairs.targets, tower.norm_weight, tower.norm_bias, eps=HEAD_EPS)
    if losses.vision_projection and pairs.image is not None:
        found["vision_projection"] = (1 - F.cosine_similarity(vision, pairs.image, dim=-1)).mean()
    if losses.text_projection and pairs.caption is not None:
        found["text_projection"] = (1 - F.cosine_similarity(caption, pairs.caption, dim=-1)).mean()
    return found


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
        self.teacher_text = load_teacher_text(config.teacher) if config.losses.text_projection else None
        if config.init:
            load_tower(self.model.vision_encoder, config.init)
        if config.bert != "untrained":
            load_bert(self.model.text_encoder, config.bert)
        if config.run.dtype == "bf16":
            self.teacher.compute_in(torch.bfloat16)
            if self.teacher_text is not None:
                self.teacher_text.compute_in(torch.bfloat16)
        use_attention(self, config.run.attention)

    @property
    def trainable(self) -> nn.Module:
        """The module that checkpoints hold, in the official stage-2 layout (without the frozen teacher)."""
        return self.model

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some parameters get no gradient: those that only a switched-off loss uses."""
        losses = self.config.losses
        return min(losses.vtc, losses.vtm, losses.mlm, losses.uta) == 0

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled apart where gradients cross the network: teachers, tower, text."""
        teachers = [module for module in (self.teacher, self.teacher_text) if module is not None]
        parts = [*self.model.vision_encoder.pieces(), *self.model.text_encoder.pieces()]
        return [(module, "forward") for module in teachers] + parts

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        """batch: `video` as in stage 1, `ids`, `mask` and `sample` (with text_projection `teacher_ids` too) as CaptionLoader
        gives them, and the same of images with `image_` before their names where clips and images are packed. Returns
        stage2_losses'."""
        return self.losses(self.prepare(batch, seed))

    def prepare(self, batch: dict[str, Tensor], seed: Tensor) -> list[Pairs]:
        """What needs no gradient: masks, teacher, hidden words; clips first where the batch has both kinds."""
        kinds = [self._pairs(batch, "", seed)]
        if "image_video" in batch:
            # The draws of a kind take seed to seed + 2.
            kinds.append(self._pairs(batch, "image_", seed + 3))
        return kinds

    def losses(self, batches: list[Pairs]) -> dict[str, Tensor]:
        """The losses of prepared batches."""
        device = batches[0].video.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.run.dtype == "bf16"):
            rank = dist.get_rank() if dist.is_initialized() else 0
            return joint_losses(self.model, self.config.losses, batches, rank)

    def _pairs(self, batch: dict[str, Tensor], prefix: str, seed: Tensor) -> Pairs:
        config = self.config
        video, ids, mask, sample = (batch[prefix + name] for name in ("video", "ids", "mask", "sample"))
        frames = video.shape[1] if video.dtype == torch.uint8 else video.shape[2]
        image = frames < config.student.num_frames
        target = self.teacher(
            video, config.image_mask if image else config.mask, seed, with_image=config.losses.vision_projection > 0
        )
        masked, labels = vision_text.mask_tokens(
            ids, mask, probability=config.mask_words, mask_id=self.mask_id, vocab_size=config.text.vocab_size,
            special=self.special,
        )  # fmt: skip
        caption = None if self.teacher_text is None else self.teacher_text(batch[prefix + "teacher_ids"])
        return Pairs(
            video, target.visible, ids, mask, sample, masked, labels, seed, target.targets, image=target.image,
            caption=caption, capacity=vision_text.masked_capacity(labels.numel(), config.mask_words),
        )  # fmt: skip

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip; where a step packs as many images, the mean of both."""
        if self.config.co_training == "alternating":
            return self.flops_of(self.config)
        return (self.flops_of(self.config) + self.flops_of(self.config, image=True)) / 2

    @staticmethod
    def flops_of(config: Stage2Config, *, image: bool = False) -> float:
        """Matrix-product FLOPs of a clip or image: teacher, tower, text (forward and backward three times forward).

        Not counted: CLIP's text tower, which only losses.text_projection runs.
        """
        if image:
            frames = config.student.tubelet_size
            config = dataclasses.replace(
                config, student=dataclasses.replace(config.student, num_frames=frames), mask=config.image_mask
            )
        text, vit = config.text, config.student
        tower = UnmaskedAlignment.flops_of(config)
        n = vit.num_frames // vit.tubelet_size * (vit.image_size // vit.patch_size) ** 2
        n = n - int(n * config.mask.ratio)
        layer = 24 * config.max_length * text.width**2 + 4 * config.max_length**2 * text.width
        cross = 4 * config.max_length * text.width**2 + 4 * config.max_length * n * text.width
        keys = 4 * n * vit.width * text.width
        fusion = text.depth - text.fusion_layer
        # The last fusion layer: one group whole, of three the class token, which asks all keys and values.
        one = layer + cross
        last = one + 3 * (one / config.max_length + 4 * config.max_length * text.width**2)
        return tower + 3 * (2 * text.fusion_layer * layer + (fusion - 1) * 4 * one + last + fusion * keys)
