"""BERT with a cross-modal upper part, computing each text and each clip's keys and values once.

Legend: B texts, l text positions, n vision tokens of a clip, W text width, C vision width, H heads. The layers below
`fusion_layer` are the text encoder, those from it on also attend to a clip (paper section 3.2). Parameter names are those of
the official implementation (`text_encoder.*`); `bert.*` and `cls.*` are Hugging Face's too.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from umt_fast.config import TextConfig
from umt_fast.models.attention import Attends
from umt_fast.models.linear import Linear

_EPS = 1e-12


class _SelfProjections(nn.Module):
    """query, key, value as BERT names them; keys and values may come from another width."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        self.query = Linear(width, width)
        self.key = Linear(source_width, width)
        self.value = Linear(source_width, width)


class _Output(nn.Module):
    """dense, dropout, residual, LayerNorm."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPS)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + residual)


class _Attention(Attends):
    """Multi-head attention of text to itself or to vision tokens, with BERT's output layer."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.attention_dropout
        self.self = _SelfProjections(config.width, source_width)
        self.output = _Output(config.width, config.width, config.hidden_dropout)

    def heads(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., H, W / H)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, source width) -> two (B, n, H, W / H)."""
        return self.heads(self.self.key(source)), self.heads(self.self.value(source))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x: (B, l, W) asks; key_mask: bool (B, n), False where a key is padding."""
        out = kernels.attention(
            self.heads(self.self.query(x)),
            k,
            v,
            key_mask=key_mask,
            dropout=self.dropout if self.training else 0.0,
            prefer=self.attention_backend,
        )
        return self.output(out.flatten(2), x)


class _Intermediate(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = Linear(width, hidden)


class TextLayer(nn.Module):
    """Post-LN BERT layer; with cross-attention between self-attention and MLP where `vision_width` is given."""

    def __init__(self, config: TextConfig, vision_width: int | None) -> None:
        super().__init__()
        self.attention = _Attention(config, config.width)
        self.crossattention = None if vision_width is None else _Attention(config, vision_width)
        self.intermediate = _Intermediate(config.width, 4 * config.width)
        self.output = _Output(4 * config.width, config.width, config.hidden_dropout)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate.dense(x)), x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """A text layer: (B, l, W) and its bool (B, l) padding mask."""
        return self._feed_forward(self.attention(x, *self.attention.keys_and_values(x), mask))

    def fuse(
        self, x: Tensor, mask: Tensor, k: Tensor, v: Tensor, negatives: Tensor | None, asked: int | None = None
    ) -> Tensor:
        """A fusion layer over groups of texts that share clips.

        Args:
            x: (G, B, l, W), G groups of B texts.
            mask: bool (G, B, l).
            k, v: (B, n, H, d) of the clips.
            negatives: int64 (B,): the last group's text i attends to clip negatives[i], all others' to clip i. None:
                there is no such group.
            asked: compute only the first so many positions of each text, (G, B, asked, W); None: all.
        """
        flat = x.flatten(0, 1)
        flat = self.attention(flat[:, :asked], *self.attention.keys_and_values(flat), mask.flatten(0, 1))
        groups, batch, length, width = *x.shape[:2], *flat.shape[1:]
        own = groups if negatives is None else groups - 1
        # Texts of one clip ask side by side: no copy of its keys and values is made.
        beside = flat.view(groups, batch, length, width)[:own].transpose(0, 1).reshape(batch, own * length, width)
        seen = self.crossattention(beside, k, v).view(batch, own, length, width).transpose(0, 1)
        if negatives is not None:
            other = self.crossattention(flat.view(groups, batch, length, width)[-1], k[negatives], v[negatives])
            seen = torch.cat([seen, other[None]])
        return self._feed_forward(seen.flatten(0, 1)).view(groups, batch, length, width)


class Embeddings(nn.Module):
    """Word, position and type embeddings, LayerNorm, dropout. The type is always 0."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=_EPS)
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])
        self.dropout = config.hidden_dropout

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """int64 (..., l) words at positions first, first + 1, ... -> (..., l, W)."""
        x = self.word_embeddings(ids) + self.position_embeddings.weight[first : first + ids.shape[-1]]
        x = x + self.token_type_embeddings.weight[0]
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class _Layers(nn.Module):
    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            TextLayer(config, vision_width if depth >= config.fusion_layer else None) for depth in range(config.depth)
        )


class Bert(nn.Module):
    """BERT without any head: text layers and fusion layers. Whoever builds one initializes it, see initialize_text.

    Fine-tuned models hold it as `text_encoder`, stage 2 as `text_encoder.bert`.
    """

    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = _Layers(config, vision_width)

    @property
    def text_layers(self) -> nn.ModuleList:
        """The layers below the fusion, whose parameters are used in their own forward alone."""
        return self.encoder.layer[: self.config.fusion_layer]

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods whose gradients are ready together: text layers, fusion layers."""
        below = self.config.fusion_layer
        return [(layer, "forward" if depth < below else "fuse") for depth, layer in enumerate(self.encoder.layer)]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text layers alone: int64 (B, l) and bool (B, l) -> (B, l, W)."""
        x = self.embeddings(ids)
        for layer in self.text_layers:
            x = layer(x, mask)
        return x

    def clip_keys(self, vision: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of clips (B, n, C) for each fusion layer, computed once however many texts will ask."""
        layers = self.encoder.layer[self.config.fusion_layer :]
        return [layer.crossattention.keys_and_values(vision) for layer in layers]

    def fuse(
        self,
        x: Tensor,
        mask: Tensor,
        clips: list[tuple[Tensor, Tensor]],
        negatives: Tensor | None = None,
        asked: int | None = None,
    ) -> Tensor:
        """Fusion layers over (G, B, l, W) texts; see TextLayer.fuse. asked: of the last layer's positions alone."""
        *lower, (last, (k, v)) = self._fusion(clips)
        for layer, source in lower:
            x = layer.fuse(x, mask, *source, negatives)
        return last.fuse(x, mask, k, v, negatives, asked)

    def fuse_for_losses(
        self, x: Tensor, mask: Tensor, clips: list[tuple[Tensor, Tensor]], negatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As fuse, but of all groups except the first the last layer computes the class token alone.

        Returns the first group (B, l, W) and the class tokens of the others (G - 1, B, 1, W).
        """
        *lower, (last, (k, v)) = self._fusion(clips)
        for layer, source in lower:
            x = layer.fuse(x, mask, *source, negatives)
        return last.fuse(x[:1], mask[:1], k, v, None)[0], last.fuse(x[1:], mask[1:], k, v, negatives, asked=1)

    def _fusion(self, clips: list[tuple[Tensor, Tensor]]) -> list[tuple[TextLayer, tuple[Tensor, Tensor]]]:
        """The fusion layers, each with its keys and values."""
        return list(zip(self.encoder.layer[self.config.fusion_layer :], clips, strict=True))


class _Transform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPS)


class _Predictions(nn.Module):
    """The masked-language head; its decoder shares the word embeddings and the bias."""

    def __init__(self, config: TextConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = _Transform(config.width)
        self.decoder = Linear(config.width, config.vocab_size)
        self.decoder.weight = words.weight
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform.LayerNorm(F.gelu(self.transform.dense(x))))


class WordHead(nn.Module):
    """The masked-language head under its official name."""

    def __init__(self, config: TextConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.predictions = _Predictions(config, words)


class TextEncoder(nn.Module):
    """BERT with its masked-language head, as stage 2 trains it."""

    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, vision_width)
        self.cls = WordHead(config, self.bert.embeddings.word_embeddings)
        initialize_text(self, config)

    @property
    def text_layers(self) -> nn.ModuleList:
        """See Bert.text_layers."""
        return self.bert.text_layers

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """As Bert.pieces, and the vocabulary head."""
        return [*self.bert.pieces(), (self.cls.predictions, "forward")]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See Bert.encode."""
        return self.bert.encode(ids, mask)

    def clip_keys(self, vision: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See Bert.clip_keys."""
        return self.bert.clip_keys(vision)

    def fuse(
        self,
        x: Tensor,
        mask: Tensor,
        clips: list[tuple[Tensor, Tensor]],
        negatives: Tensor | None = None,
        asked: int | None = None,
    ) -> Tensor:
        """See Bert.fuse."""
        return self.bert.fuse(x, mask, clips, negatives, asked)

    def fuse_for_losses(
        self, x: Tensor, mask: Tensor, clips: list[tuple[Tensor, Tensor]], negatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See Bert.fuse_for_losses."""
        return self.bert.fuse_for_losses(x, mask, clips, negatives)


def initialize_text(module: nn.Module, config: TextConfig) -> None:
    """BERT's initial values in every part of a module: normal weights and embeddings, zero biases."""
    module.apply(functools.partial(_initialize, std=config.init_std))


def _initialize(module: nn.Module, std: float) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
