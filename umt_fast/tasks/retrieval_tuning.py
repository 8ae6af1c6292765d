"""Fine-tuning for retrieval (and multiple choice): contrastive and matching losses over whole clips, frame by frame.

Unlike stage 2 nothing is masked and no teacher runs. A clip's similarity with a text is the mean over frames of the cosines
of each frame's pooled vector; the matching head reads the tokens of all frames as one sequence. Legend: B pairs, l text
positions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from umt_fast.config import AttentionBackend, ConfigError, RetrievalConfig, TextConfig, VitConfig, require
from umt_fast.config.unused import Refuse
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.captions import CaptionList, list_and_folder
from umt_fast.data.sources.choices import read_choices
from umt_fast.data.sources.pairs import read_pairs
from umt_fast.data.sources.queries import read_queries
from umt_fast.engine.distributed import Ranks
from umt_fast.models import flops
from umt_fast.models.attention import use_attention
from umt_fast.models.description import base_description, text_description
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.weights import load_retrieval
from umt_fast.tasks import retrieval
from umt_fast.tasks import video_text_losses as vision_text
from umt_fast.tasks.base import register
from umt_fast.tasks.choosing import choice_batches
from umt_fast.tasks.clips import clip_loader, random_clips, random_integers
from umt_fast.tasks.matching import whole_frames
from umt_fast.tasks.multiple_choice import choose


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
        index: int64 (B,), equal for rows that are right answers of each other (see data/sources/pairs.py).
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


class _Judged:
    """What both kinds of validation share: their list, tokens, and clips cut as the official evaluation does."""

    def __init__(self, config: RetrievalConfig, ranks: Ranks) -> None:
        """Raises DataError: a list that cannot be read, or names files that are not there."""
        self.config, self.ranks = config, ranks
        self.source, self.root = list_and_folder(config.data.validation or config.select_on_test)
        self.data, self.words = whole_frames(config.data), load_tokenizer(config.tokenizer)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        return Tokens(texts, self.words, max_length=self.config.max_length, sep=self.config.sep_token)


class RecallValidation(_Judged):
    """Recalls both ways on a caption list, by embeddings and re-ranked."""

    best = "match_r_mean"

    def __init__(self, config: RetrievalConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        workers = config.data.workers
        self.queries = read_queries(self.source, self.root, joining=config.captions, workers=workers)

    def figures(self, objective: RetrievalTuning) -> dict[str, float]:
        found, _, _ = retrieval.evaluate(
            objective.model,
            self.queries,
            self.tokens(self.queries.captions),
            self.data,
            self.ranks,
            batch_size=self.config.run.batch_size,
            dtype=self.config.run.dtype,
        )
        return {name: value for name, value in found.items() if name not in ("clips", "captions")}


class ChoiceValidation(_Judged):
    """Accuracy on a list of choices."""

    best = "accuracy"

    def __init__(self, config: RetrievalConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.choices = read_choices(self.source, self.root)

    def figures(self, objective: RetrievalTuning) -> dict[str, float]:
        size, vit = self.config.run.batch_size, self.config.student
        tokens = self.tokens(self.choices.options)
        batches = choice_batches(self.choices, tokens, self.data, vit, self.ranks, batch_size=size)
        return {
            "accuracy": choose(objective.model, batches, self.ranks, dtype=self.config.run.dtype).figures["accuracy"]
        }


# Places in the vocabulary of random text: the class token, and the first word that is none of the special tokens.
_CLS, _FIRST_WORD = 1, 4


class RetrievalTask:
    """Fine-tuning of a stage-2 model on captioned clips, for retrieval and multiple choice."""

    name = "retrieval"
    Config = RetrievalConfig

    def settled(self, config: RetrievalConfig) -> RetrievalConfig:
        return config

    def refuse_unread(self, config: RetrievalConfig, refuse: Refuse, world_size: int) -> None:
        refuse("data.train", "retrieval reads caption lists: give them with --videos")
        refuse("data.root", "caption lists carry their folders: give LIST=FOLDER")
        refuse("data.separator data.frame_pattern", "caption lists have neither columns nor frame folders")
        if not config.run.validate_epochs:
            refuse("select_on_test", "run.validate_epochs is 0, so that nothing is judged during training")
        if not config.losses.vtc:
            refuse("losses.gather", "losses.vtc is 0, and no other loss gathers")
        require(
            not config.losses.vtc or config.run.batch_size * world_size >= 2,
            f"run.batch_size is {config.run.batch_size} on {world_size} rank, and losses.vtc compares pairs with each other; "
            "raise it, or set losses.vtc to 0",
        )

    def objective(self, config: RetrievalConfig) -> RetrievalTuning:
        return RetrievalTuning(
            config.student,
            config.text,
            embed_dim=config.embed_dim,
            init=config.init,
            max_length=config.max_length,
            dtype=config.run.dtype,
            attention=config.run.attention,
            vtc=config.losses.vtc,
            vtm=config.losses.vtm,
            gather=config.losses.gather,
        )

    def untrained(self, config: RetrievalConfig) -> RetrievalTuning:
        config = copy.copy(config)
        config.init = ""
        return self.objective(config)

    def loader(self, config: RetrievalConfig, ranks: Ranks) -> CaptionLoader:
        """Captioned clips; `sample` is equal for rows that are right answers of each other."""
        rows, tokenizer = _rows(config), load_tokenizer(config.tokenizer)
        require(
            len(tokenizer) <= config.text.vocab_size,
            f"text.vocab_size is {config.text.vocab_size}, but the tokenizer {config.tokenizer} has {len(tokenizer)} words",
        )
        # With run.tune the winner is not known yet, and the candidates were timed with this shape.
        fixed = config.run.compile or config.run.cuda_graph or config.run.tune != "off"
        tokens = Tokens(rows.captions, tokenizer, max_length=config.max_length, sep=config.sep_token, fixed=fixed)
        return CaptionLoader(clip_loader(config, rows.clips, config.student.num_frames, ranks), tokens, rows.sample)

    def validation(self, config: RetrievalConfig, ranks: Ranks) -> RecallValidation | ChoiceValidation | None:
        if not config.data.validation and not config.select_on_test:
            return None
        return {"retrieval": RecallValidation, "choices": ChoiceValidation}[config.validate](config, ranks)

    def random_batches(self, config: RetrievalConfig) -> list[dict[str, Tensor]]:
        """Texts are of full length."""
        batch, words = random_clips(config, config.student.num_frames), config.text.vocab_size
        ids = random_integers(words, len(batch["index"]), config.max_length, least=min(_FIRST_WORD, words - 1))
        ids[:, 0] = _CLS
        return [batch | {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "sample": batch["index"]}]

    def without_noise(self, config: RetrievalConfig) -> RetrievalConfig:
        student = dataclasses.replace(config.student, drop_path=0.0)
        text = dataclasses.replace(config.text, hidden_dropout=0.0, attention_dropout=0.0)
        return dataclasses.replace(config, student=student, text=text)

    def clips_of_epoch(self, config: RetrievalConfig) -> tuple[int, str] | None:
        if not config.videos:
            return None
        return len(_rows(config).captions), f"rows of {', '.join(config.videos)}"

    def visible_tokens(self, config: RetrievalConfig) -> int:
        return flops.visible_of(config.student, None)

    def describe(self, config: RetrievalConfig) -> dict[str, Any]:
        return base_description(self.name, config) | {
            "text": text_description(config.text),
            "embed_dim": config.embed_dim,
            "max_length": config.max_length,
            "sep_token": config.sep_token,
        }


def _rows(config: RetrievalConfig) -> CaptionList:
    """The rows of the training lists. Raises ConfigError: there is no list. DataError: one cannot be read."""
    if not config.videos:
        raise ConfigError("videos is empty; give caption lists: --videos list.json=folder")
    return read_pairs(
        config.videos, joining=config.captions, same_sample=config.same_sample, workers=config.data.workers
    )


register(RetrievalTask())
