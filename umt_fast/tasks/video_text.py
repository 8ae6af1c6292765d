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
from umt_fast.config import AlignConfig, Stage2Config, Stage2Losses
from umt_fast.masking import draw_uniform
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.video_text import HEAD_EPS, VideoText
from umt_fast.models.weights import load_bert, load_teacher, load_teacher_text, start_video_text
from umt_fast.tasks import video_text_losses as vision_text


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
    pooled: int = 1,
    align: AlignConfig | None = None,
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
        pooled: equal parts of the tokens that are pooled apart; similarities are their mean. 1: all tokens together.
        align: normalisation and distance of the alignment loss; None: the official ones.

    The model's temperature is first brought into its bounds, in place.

    Returns:
        fp32 scalars: `loss`, the weighted sum, and `vtc`, `vtm`, `mlm`, `uta` (detached) as far as their weights are not 0.
    """
    pairs = Pairs(video, visible, ids, mask, index, masked_ids, labels, seed, targets, negatives, capacity=capacity)
    return joint_losses(model, losses, [pairs._replace(pooled=pooled)], rank, align)


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
    pooled: int = 1


def joint_losses(
    model: VideoText, losses: Stage2Losses, batches: Sequence[Pairs], rank: int = 0, align: AlignConfig | None = None
) -> dict[str, Tensor]:
    """As stage2_losses, the mean of several batches: what the mean of their single steps would give, gradients too."""
    align, temperature = align or AlignConfig(), model.bound_temperature()
    heads = losses.uta > 0 and all(pairs.targets is not None for pairs in batches)
    if len(batches) == 1:
        seen = [model.vision_encoder.embed(batches[0].video, batches[0].visible, heads=heads)]
    else:
        seen = model.vision_encoder.embed_packed([(pairs.video, pairs.visible) for pairs in batches], heads=heads)
    texts = _encode(model, batches)
    found: dict[str, Tensor] = {}
    for pairs, (tokens, outputs), (plain, masked) in zip(batches, seen, texts, strict=True):
        parts = _losses_of(model, losses, align, temperature, pairs, tokens, outputs, plain, masked, rank)
        for name, value in parts.items():
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
    model: VideoText, losses: Stage2Losses, align: AlignConfig, temperature: Tensor, pairs: Pairs, tokens: Tensor,
    heads: Tensor | None, plain: Tensor, masked: Tensor, rank: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The losses of one kind by name, from its vision tokens (B, n, C) and its plain and masked text (B, l, W)."""
    text, tower, found = model.text_encoder, model.vision_encoder, {}
    vision, caption = model.project_vision(tower.pool(tokens, pairs.pooled)), model.project_text(plain)
    sim = vision_text.similarity(vision, caption, pairs.index, temperature, losses.gather)
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
        found["uta"] = kernels.align_loss(
            heads,
            pairs.targets,
            tower.norm_weight,
            tower.norm_bias,
            eps=HEAD_EPS,
            normalize=align.normalize,
            loss=align.loss,
        )
    if losses.vision_projection and pairs.image is not None:
        found["vision_projection"] = (1 - F.cosine_similarity(vision, pairs.image, dim=-1)).mean()
    if losses.text_projection and pairs.caption is not None:
        found["text_projection"] = (1 - F.cosine_similarity(caption, pairs.caption, dim=-1)).mean()
    return found


class VideoTextPretraining(nn.Module):
    """batch of captioned clips -> loss. The model is trained and saved; the CLIP teacher, None where no loss reads it, is
    frozen."""

    def __init__(self, config: Stage2Config, *, mask_id: int, special: tuple[int, ...]) -> None:
        """mask_id and special: the tokenizer's [MASK], and the ids that are never hidden."""
        super().__init__()
        self.config, self.mask_id, self.special = config, mask_id, special
        vit, layers = config.student, config.align.num_layers
        self.model = VideoText(
            vit, config.text, num_layers=layers, output_dim=config.teacher.output_dim, embed_dim=config.embed_dim
        )
        self.teacher = None
        if config.runs_teacher:
            self.teacher = ClipTeacher(config.teacher, layers, vit.tubelet_size)
            load_teacher(self.teacher, config.teacher)
        self.teacher_text = load_teacher_text(config.teacher) if config.losses.text_projection else None
        with_text = bool(config.init) and start_video_text(self.model, config.init)
        if config.bert != "untrained" and not with_text:
            load_bert(self.model.text_encoder, config.bert)
        if config.run.dtype == "bf16":
            for frozen in (self.teacher, self.teacher_text):
                if frozen is not None:
                    frozen.compute_in(torch.bfloat16)
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
            return joint_losses(self.model, self.config.losses, batches, rank, self.config.align)

    def _pairs(self, batch: dict[str, Tensor], prefix: str, seed: Tensor) -> Pairs:
        config = self.config
        video, ids, mask, sample = (batch[prefix + name] for name in ("video", "ids", "mask", "sample"))
        visible, targets, clip_image, frames = self._visible(video, seed)
        masked, labels = vision_text.mask_tokens(
            ids, mask, probability=config.mask_words, mask_id=self.mask_id, vocab_size=config.text.vocab_size,
            special=self.special,
        )  # fmt: skip
        caption = None if self.teacher_text is None else self.teacher_text(batch[prefix + "teacher_ids"])
        return Pairs(
            video, visible, ids, mask, sample, masked, labels, seed, targets, image=clip_image, caption=caption,
            capacity=vision_text.masked_capacity(labels.numel(), config.mask_words),
            pooled=frames if config.pools_frames else 1,
        )  # fmt: skip

    def _visible(self, video: Tensor, seed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Visible tokens, the teacher's targets and image embedding where a loss reads them, and the token frames."""
        config, grid = self.config, self.model.vision_encoder.encoder.grid
        frames = (video.shape[1] if video.dtype == torch.uint8 else video.shape[2]) // config.student.tubelet_size
        grid = dataclasses.replace(grid, frames=frames)
        mask = config.mask_of(image=frames == 1)  # one token frame, as officially
        if self.teacher is not None:
            losses = config.losses
            output = self.teacher(
                video, mask, seed, with_image=losses.vision_projection > 0, with_targets=losses.uta > 0
            )
            return *output, frames
        if mask is not None:
            return draw_uniform(mask.kind, len(video), grid, mask.ratio, seed), None, None, frames
        every = self.model.vision_encoder.encoder.every[: grid.size]
        return every.expand(len(video), -1), None, None, frames

    def flops_per_clip(self) -> float:
        """Matrix-product FLOPs of a clip; where a step packs as many images, the mean of both."""
        if self.config.co_training == "alternating":
            return self.flops_of(self.config)
        return (self.flops_of(self.config) + self.flops_of(self.config, image=True)) / 2

    @staticmethod
    def flops_of(config: Stage2Config, *, image: bool = False) -> float:
        """Matrix-product FLOPs of a clip or image: teacher, tower, text (forward and backward three times forward).

        What is not counted: see objectives/flops.py.
        """
        vit, text, losses, layers = config.student, config.text, config.losses, config.align.num_layers
        if image:
            vit = dataclasses.replace(vit, num_frames=vit.tubelet_size)
        mask = config.mask_of(image=image)
        visible = flops.visible_of(vit, mask)
        heads = layers if losses.uta else 0
        total = flops.tower_flops(vit, visible, num_layers=heads, output_dim=config.teacher.output_dim)
        if config.runs_teacher:
            total += flops.teacher_flops(
                config.teacher, vit, mask, num_layers=heads, with_image=losses.vision_projection > 0
            )
        batch = config.run.batch_size
        asked = vision_text.masked_capacity(batch * config.max_length, config.mask_words) / batch if losses.mlm else 0.0
        return total + flops.text_flops(
            text, length=config.max_length, visible=visible, pooled=flops.grid_of(vit).frames if config.pools_frames else 1,
            vision_width=vit.width, embed_dim=config.embed_dim, asked=asked, fuses=losses.vtm > 0 or losses.mlm > 0,
        )  # fmt: skip
