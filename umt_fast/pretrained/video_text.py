"""Stage-2 models, and those fine-tuned for retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.config import require
from umt_fast.data.loaders.given import Videos
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.captions import clean_texts
from umt_fast.data.sources.clip import DataError
from umt_fast.models.description import text_config, vit_config
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.video_text import VideoText
from umt_fast.models.vit import VisionTransformer
from umt_fast.models.weights import (
    fit_retrieval,
    fit_video_text,
)
from umt_fast.pretrained.base import PretrainedModel


class VideoTextModel(PretrainedModel):
    """A stage-2 model: clips, texts, and how well they go together. `pooled` has gone through `pool_norm`."""

    task = "video_text"
    sampling, augment = "intervals", "whole"
    network: VideoText

    @classmethod
    def empty(cls, description: dict[str, Any]) -> VideoText:
        sizes = {name: description[name] for name in ("num_layers", "output_dim", "embed_dim")}
        return VideoText(vit_config(description), text_config(description), **sizes)

    @classmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        fit_video_text(network, state, source)

    @property
    def tower(self) -> VisionTransformer:
        return self.network.vision_encoder.encoder

    def _finish(self, last: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tower.norm(last)
        return tokens, self.network.vision_encoder.pool(tokens)[:, 0]

    def _embedding(self, tokens: Tensor) -> Tensor:
        return self.network.project_vision(self.network.vision_encoder.pool(tokens, self.tower.grid.frames))

    @torch.no_grad()
    def vectors_of_pixels(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens, pooled = self.encode_pixels(pixels)
        with self._autocast():
            return {"pooled": pooled, "embedding": self._embedding(tokens)}

    def encode_video(self, videos: Videos) -> Tensor:
        """(B, E), as retrieval compares them: unit vectors of the frames, averaged. videos and errors as for features."""
        return self.vectors(videos)["embedding"]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, E) unit vectors of the texts, cleaned as captions are.

        Raises:
            ConfigError: no tokenizer is known, or not the model's; one text in place of a list.
            DataError: an empty list, a text without a word, a tokenizer that cannot be had.
        """
        with self._autocast():
            return self.network.project_text(self._read(texts)[0])

    def similarity(self, videos: Videos, texts: Sequence[str]) -> Tensor:
        """(B, N): products of the embeddings, the score that retrieval ranks by first. Raises as the two encoders."""
        return self.encode_video(videos) @ self.encode_text(texts).t()

    @torch.no_grad()
    def match(self, videos: Videos, texts: Sequence[str]) -> Tensor:
        """(B, N): logits of the matching head, by which retrieval re-ranks. Every pair goes through the fusion layers."""
        text = self.network.text_encoder
        with self._autocast():
            hidden, mask = self._read(texts)
            rows = []
            for clip in self._finish(self._outputs(self.pixels(videos), 1)[-1])[0].split(1):
                fused = text.fuse(hidden[:, None], mask[:, None], text.clip_keys(clip))
                rows.append(self.network.match(fused[:, 0])[:, 1].float())
        return torch.stack(rows)

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text layers' outputs (N, l, W) and mask (N, l)."""
        require(not isinstance(texts, str), f"texts is one text, {str(texts)[:60]!r}; give a list of texts")
        cleaned = clean_texts(texts)
        if not cleaned:
            raise DataError("no texts: the list is empty; give at least one")
        described = self.description
        tokens = Tokens(cleaned, self.tokenizer, max_length=described["max_length"], sep=described["sep_token"])
        ids, mask = (part.to(self.device) for part in tokens[torch.arange(len(cleaned))])
        return self.network.text_encoder.encode(ids, mask), mask


class TunedVideoTextModel(VideoTextModel):
    """A stage-2 model fine-tuned for retrieval: the same, without the heads that only stage 2 trains."""

    task = "retrieval"
    network: RetrievalModel

    @classmethod
    def empty(cls, description: dict[str, Any]) -> RetrievalModel:
        return RetrievalModel(vit_config(description), text_config(description), embed_dim=description["embed_dim"])

    @classmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        fit_retrieval(network, state, source)
