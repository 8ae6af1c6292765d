"""Stage 2, one step: clips or images with captions through tower and text encoder to four losses (paper section 3.2).

What is computed once that the official step computes several times: the text layers run over plain and masked text
together; the fusion layers over matched, wrong-text, masked and wrong-clip pairs together; each clip's keys and values once
for each fusion layer. What is left out because nothing reads it: the last fusion layer at the pairs' other positions than the
class token, vocabulary logits at positions that are not asked.

A step may hold clips and images (packed co-training): they go through tower and text layers together; the losses are those
of each kind, negatives included, and the step's loss is their mean.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from umt_fast.config import (
    CLIP_TEXT_LENGTH,
    CLIP_TEXT_WORDS,
    ConfigError,
    Stage2Config,
    require,
)
from umt_fast.config.unused import Refuse
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.joint import AlternatingLoader, PackedLoader
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.captions import read_corpora
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.precision import pick_device
from umt_fast.masking import mask_named
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.description import base_description, text_description
from umt_fast.models.sizes import USUAL_WEIGHTS
from umt_fast.models.teachers import build_teacher, teacher_kind
from umt_fast.models.teachers.quantized import require_precision
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import load_bert, start_video_text
from umt_fast.tasks import video_text_losses as vision_text
from umt_fast.tasks.base import register
from umt_fast.tasks.clips import clip_loader, random_clips, random_integers
from umt_fast.tasks.pretraining import refuse_teacher, warn_of_no_bound


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
            self.teacher = build_teacher(config.teacher, layers, vit.tubelet_size)
        self.teacher_text = None
        if config.losses.text_projection:
            self.teacher_text = teacher_kind(config.teacher).load_text(config.teacher)
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

    def prepare(self, batch: dict[str, Tensor], seed: Tensor) -> list[vision_text.Pairs]:
        """What needs no gradient: masks, teacher, hidden words; clips first where the batch has both kinds."""
        kinds = [self._pairs(batch, "", seed)]
        if "image_video" in batch:
            # The draws of a kind take seed to seed + 2.
            kinds.append(self._pairs(batch, "image_", seed + 3))
        return kinds

    def losses(self, batches: list[vision_text.Pairs]) -> dict[str, Tensor]:
        """The losses of prepared batches."""
        device = batches[0].video.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.run.dtype == "bf16"):
            rank = dist.get_rank() if dist.is_initialized() else 0
            return vision_text.joint_losses(self.model, self.config.losses, batches, rank, self.config.align)

    def _pairs(self, batch: dict[str, Tensor], prefix: str, seed: Tensor) -> vision_text.Pairs:
        config = self.config
        video, ids, mask, sample = (batch[prefix + name] for name in ("video", "ids", "mask", "sample"))
        visible, targets, clip_image, frames = self._visible(video, seed)
        masked, labels = vision_text.mask_tokens(
            ids,
            mask,
            probability=config.mask_words,
            mask_id=self.mask_id,
            vocab_size=config.text.vocab_size,
            special=self.special,
        )
        caption = None if self.teacher_text is None else self.teacher_text(batch[prefix + "teacher_ids"])
        return vision_text.Pairs(
            video,
            visible,
            ids,
            mask,
            sample,
            masked,
            labels,
            seed,
            targets,
            image=clip_image,
            caption=caption,
            capacity=vision_text.masked_capacity(labels.numel(), config.mask_words),
            pooled=frames if config.pools_frames else 1,
        )

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
            return mask_named(mask.kind).draw(len(video), grid, mask.ratio, seed), None, None, frames
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

        What is not counted: see models/flops.py.
        """
        vit, losses, layers = config.student, config.losses, config.align.num_layers
        if image:
            vit = dataclasses.replace(vit, num_frames=vit.tubelet_size)
        mask = config.mask_of(image=image)
        visible = flops.visible_of(vit, mask)
        heads = layers if losses.uta else 0
        total = flops.tower_flops(vit, visible, num_layers=heads, output_dim=config.teacher.output_dim)
        if config.runs_teacher:
            total += teacher_kind(config.teacher).flops(
                config.teacher, vit, mask, num_layers=heads, with_image=losses.vision_projection > 0
            )
        return total + flops.text_flops(config.text, **VideoTextPretraining.text_shapes(config, image=image))

    @staticmethod
    def text_shapes(config: Stage2Config, *, image: bool = False) -> dict[str, Any]:
        """What models/flops.py asks of the text's work for a clip or image."""
        vit, losses, batch = config.student, config.losses, config.run.batch_size
        if image:
            vit = dataclasses.replace(vit, num_frames=vit.tubelet_size)
        asked = vision_text.masked_capacity(batch * config.max_length, config.mask_words) / batch if losses.mlm else 0.0
        return {
            "length": config.max_length,
            "visible": flops.visible_of(vit, config.mask_of(image=image)),
            "pooled": flops.grid_of(vit).frames if config.pools_frames else 1,
            "vision_width": vit.width,
            "embed_dim": config.embed_dim,
            "asked": asked,
            "fuses": losses.vtm > 0 or losses.mlm > 0,
        }


# Places in the vocabulary of random text: the class token, what is never hidden, the mask's.
_CLS, _SPECIAL, _MASK = 1, (0, 1, 2), 3


class VideoTextTask:
    """Pre-training on captioned clips and images."""

    name = "video_text"
    Config = Stage2Config

    def settled(self, config: Stage2Config) -> Stage2Config:
        if config.runs_teacher:
            require_precision(config.teacher, pick_device(config.run.device))
        if config.losses.uta:
            warn_of_no_bound(config.align)
        return config

    def refuse_unread(self, config: Stage2Config, refuse: Refuse, world_size: int) -> None:
        refuse_teacher(config, refuse)
        _refuse_unread(config, refuse, world_size)

    def objective(self, config: Stage2Config) -> VideoTextPretraining:
        tokenizer = load_tokenizer(config.tokenizer)
        if len(tokenizer) > config.text.vocab_size:
            raise ConfigError(
                f"text.vocab_size is {config.text.vocab_size}, but the tokenizer {config.tokenizer} has {len(tokenizer)} words"
            )
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        return VideoTextPretraining(config, mask_id=tokenizer.mask_token_id, special=special)

    def untrained(self, config: Stage2Config) -> VideoTextPretraining:
        config = copy.deepcopy(config)
        config.init, config.bert = "", "untrained"
        if not config.losses.text_projection:  # CLIP's text tower has no untrained form
            config.teacher.weights = "untrained"
        return VideoTextPretraining(config, mask_id=_MASK, special=_SPECIAL)

    def loader(self, config: Stage2Config, ranks: Ranks) -> AlternatingLoader | PackedLoader:
        """Captioned clips and images, in turn or packed."""
        if not config.videos and not config.images:
            raise ConfigError("videos and images are both empty; give caption lists: --videos list.json=folder")
        packed = config.co_training == "packed"
        if packed and not (config.videos and config.images):
            missing = "images" if config.videos else "videos"
            raise ConfigError(f"co_training 'packed' needs clips and images, but {missing} is empty; use 'alternating'")
        tokenizer = load_tokenizer(config.tokenizer)
        # With run.tune the winner is not known yet, and the candidates were timed with this shape.
        fixed = config.run.compile or config.run.cuda_graph or config.run.tune != "off"
        parts = []
        for entries, frames in (
            (config.videos, config.student.num_frames),
            (config.images, config.student.tubelet_size),
        ):
            if entries:
                corpus = read_corpora(entries, workers=config.data.workers)
                tokens = Tokens(
                    corpus.captions,
                    tokenizer,
                    max_length=config.max_length,
                    sep=config.sep_token,
                    fixed=fixed,
                    teacher=config.losses.text_projection > 0,
                )
                # Single pictures cost a CPU little, and are no videos to DALI.
                data = config.data if entries is config.videos else dataclasses.replace(config.data, reader="cpu")
                sample = corpus.sample if config.same_sample == "media" else torch.arange(len(corpus.sample))
                parts.append(CaptionLoader(clip_loader(config, corpus.clips, frames, ranks, data), tokens, sample))
        return PackedLoader(*parts) if packed else AlternatingLoader(parts, config.run.seed)

    def validation(self, config: Stage2Config, ranks: Ranks) -> None:
        return None

    def random_batches(self, config: Stage2Config) -> list[dict[str, Tensor]]:
        """Texts are of full length."""
        kinds = [(config.videos, config.student.num_frames), (config.images, config.student.tubelet_size)]
        found = [self._random_batch(config, frames) for entries, frames in kinds if entries]
        if config.co_training == "alternating":
            return found
        clip, image = found
        images = {f"image_{name}": value for name, value in image.items()}
        return [clip | images | {"index": torch.cat([clip["index"], image["index"]])}]

    def _random_batch(self, config: Stage2Config, num_frames: int) -> dict[str, Tensor]:
        batch, words = random_clips(config, num_frames), config.text.vocab_size
        rows = len(batch["index"])
        ids = random_integers(words, rows, config.max_length, least=min(_MASK + 1, words - 1))
        ids[:, 0] = _CLS
        batch |= {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "sample": batch["index"]}
        if config.losses.text_projection:
            teacher_ids = random_integers(CLIP_TEXT_WORDS - 1, rows, CLIP_TEXT_LENGTH)
            teacher_ids[:, -1] = CLIP_TEXT_WORDS - 1  # the end token has the largest id
            batch["teacher_ids"] = teacher_ids
        return batch

    def without_noise(self, config: Stage2Config) -> Stage2Config:
        student = dataclasses.replace(config.student, drop_path=0.0)
        text = dataclasses.replace(config.text, hidden_dropout=0.0, attention_dropout=0.0)
        return dataclasses.replace(config, student=student, text=text)

    def clips_of_epoch(self, config: Stage2Config) -> None:
        """Lists of tens of millions are not read for a plan."""

    def visible_tokens(self, config: Stage2Config) -> int:
        return flops.visible_of(config.student, config.mask_of(image=False))

    def describe(self, config: Stage2Config) -> dict[str, Any]:
        return base_description(self.name, config) | {
            "num_layers": config.align.num_layers,
            "output_dim": config.teacher.output_dim,
            "text": text_description(config.text),
            "embed_dim": config.embed_dim,
            "max_length": config.max_length,
            "sep_token": config.sep_token,
        }


def _refuse_unread(config: Stage2Config, refuse: Refuse, world_size: int) -> None:
    """What only stage 2 has or does not read. And a contrastive loss whose joint batch is a single pair is refused."""
    losses, one_frame = config.losses, config.student.num_frames == config.student.tubelet_size
    refuse("data.train", "stage 2 reads caption lists: give them with --videos and --images")
    refuse("data.root", "caption lists carry their folders: give LIST=FOLDER")
    refuse("data.separator data.frame_pattern", "caption lists have neither columns nor frame folders")
    if not losses.mlm:
        refuse("mask_words", "losses.mlm is 0, so that no word is asked for")
    if not losses.vtc:
        refuse("losses.gather", "losses.vtc is 0, and no other loss gathers")
        if not losses.vtm:
            refuse("same_sample", "losses.vtc and losses.vtm are 0, and no other loss compares samples")
    if not losses.uta:
        refuse("align.loss align.normalize", "losses.uta is 0, and nothing is aligned")
    if not config.runs_teacher:
        refuse("teacher.precision", "no loss runs the teacher")
        if not losses.text_projection:
            # What pages say of a teacher's size goes with these.
            refuse("teacher.weights", "no loss runs the teacher", "untrained", *USUAL_WEIGHTS.values())
        for name, mask in (("mask", config.mask), ("image_mask", config.image_mask)):
            if config.mask_of(image=name == "image_mask") is None:
                why = f"{name}.kind {mask.kind!r} hides nothing where no loss runs a teacher: take another one, as tube"
                refuse(f"{name}.ratio", why)
    if config.videos and not config.images and not one_frame:
        refuse("image_mask.kind", "images is empty", config.mask.kind)
        refuse("image_mask.ratio", "images is empty")
    if config.images and not config.videos:
        refuse("mask.kind", "videos is empty, and images have image_mask", config.image_mask.kind)
        refuse("mask.ratio", "videos is empty, and images have image_mask", config.image_mask.ratio)
    elif one_frame:
        why = "clips of one token frame are masked as images are, by image_mask"
        refuse("mask.kind", why, config.image_mask.kind)
        refuse("mask.ratio", why, config.image_mask.ratio)
    require(
        not losses.vtc or config.run.batch_size * world_size >= 2,
        f"run.batch_size is {config.run.batch_size} on {world_size} rank, and losses.vtc compares pairs with each other; "
        "raise it, or set losses.vtc to 0",
    )


register(VideoTextTask())
