"""Answers word by word: a causal BERT whose every layer also attends to the states of a question.

Legend: B questions, m positions of a question, K answers to each, l positions of an answer, W text width, V vocabulary,
H heads. Parameter names are the official ones (`text_decoder.*`). An answer begins with the class token; the position
before a word predicts it.

A question is read once however many answers are judged: its keys and values are computed once for each layer, and its
answers ask them side by side. Earlier positions of an answer never see later ones, so that padding at its end needs no mask,
and what is known of earlier positions is kept (see Past) instead of being computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import TextConfig
from umt_fast.models.text import Embeddings, TextLayer, WordHead, initialize_text

KeysValues = tuple[Tensor, Tensor]
# What the self-attention of each layer keeps of earlier positions: keys and values, (B, K or 1, p, H, W / H) each.
Past = Sequence[KeysValues]


class _DecoderLayer(TextLayer):
    """A fusion layer whose self-attention looks back only and whose cross-attention reads a question."""

    def look_back(self, x: Tensor, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """Self-attention of new positions (B, K, l, W), which follow p earlier ones, and their own keys and values.

        One past for all K answers (B, 1, p, ...) serves each of them.
        """
        batch, answers, length, _ = x.shape
        own = self.attention.keys_and_values(x)
        k, v = own
        earlier = 0
        if past is not None:
            earlier = past[0].shape[2]
            k, v = (
                torch.cat([before.expand(batch, answers, *before.shape[2:]), new], 2)
                for before, new in zip(past, own, strict=True)
            )
        # An answer is a handful of positions: PyTorch's own kernel, whatever backend the long sequences take.
        q, k, v = (
            part.flatten(0, 1).transpose(1, 2) for part in (self.attention.heads(self.attention.self.query(x)), k, v)
        )
        allowed = torch.ones(length, earlier + length, dtype=torch.bool, device=x.device).tril(earlier)
        dropout = self.attention.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        seen = seen.transpose(1, 2).flatten(2).view(x.shape)
        return self.attention.output(seen, x), own

    def ask(self, x: Tensor, question: KeysValues, mask: Tensor) -> Tensor:
        """Cross-attention and MLP of (B, K, l, W); question: its keys and values (B, m, H, W / H), mask: bool (B, m)."""
        beside = x.flatten(1, 2)
        return self._feed_forward(self.crossattention(beside, *question, mask)).view(x.shape)


class _DecoderLayers(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _DecoderLayer(config, config.width) for _ in range(config.depth - config.fusion_layer)
        )


class _DecoderBert(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = _DecoderLayers(config)


class AnswerDecoder(nn.Module):
    """As many causal layers as the text encoder has fusion layers, from which they are started, and a tied word head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = _DecoderBert(config)
        self.cls = WordHead(config, self.bert.embeddings.word_embeddings)
        initialize_text(self, config)

    @property
    def layers(self) -> nn.ModuleList:
        """The causal layers, first to last."""
        return self.bert.encoder.layer

    def question_keys(self, states: Tensor) -> list[KeysValues]:
        """Keys and values of question states (B, m, W) for each layer, (B, m, H, W / H) each."""
        return [layer.crossattention.keys_and_values(states) for layer in self.layers]

    def run(
        self, x: Tensor, questions: list[KeysValues], mask: Tensor, past: Past | None = None, *, attended: bool = False
    ) -> tuple[Tensor, list[KeysValues]]:
        """New positions of K answers to each question through all layers.

        Args:
            x: (B, K, l, W) embeddings; with `attended` what the first layer's self-attention made of them.
            questions, mask: question_keys' and bool (B, m), False at padding.
            past: keys and values of the positions before these, for each layer (with `attended` the first one's is unused).

        Returns:
            The last layer's output (B, K, l, W), and the new positions' keys and values of each layer (with `attended`, of
            all but the first).
        """
        kept = []
        for depth, (layer, question) in enumerate(zip(self.layers, questions, strict=True)):
            if depth > 0 or not attended:
                x, own = layer.look_back(x, None if past is None else past[depth])
                kept.append(own)
            x = layer.ask(x, question, mask)
        return x, kept

    def forward(self, ids: Tensor, questions: list[KeysValues], mask: Tensor) -> Tensor:
        """The states (B, K, l, W) of whole answers int64 (B, K, l); see run."""
        return self.run(self.bert.embeddings(ids), questions, mask)[0]


def word_log_probabilities(head: nn.Module, states: Tensor, words: Tensor, memory: int = 256 << 20) -> Tensor:
    """Log-probability of one word after each state: (N, W), int64 (N,) -> fp32 (N,).

    memory: bytes that the vocabulary logits may take at a time: states are taken in chunks of that many.
    """
    vocabulary = head.decoder.out_features
    # Logits as the head gives them, a copy in fp32, and what logsumexp needs beside them.
    rows = max(1, memory // (3 * 4 * vocabulary))
    parts = []
    for chosen, asked in zip(states.split(rows), words.split(rows), strict=True):
        logits = head(chosen).float()
        parts.append(logits.gather(1, asked[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerList:
    """Answers to choose from, with what of the decoder does not depend on a question, computed once.

    ids: int64 (A, l), l the longest of them. lengths: int64 (A,), positions that are no padding. attended: (A, l - 2, W), the
    first layer's self-attention at the positions after the class token that predict a word.
    """

    ids: Tensor
    lengths: Tensor
    attended: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def _require_answers(ids: Tensor, mask: Tensor) -> Tensor:
    """The lengths (A,) of answers that the decoder can judge; raises ValueError for others."""
    if ids.ndim != 2 or ids.shape != mask.shape or len(ids) == 0 or ids.shape[1] < 2:
        raise ValueError(
            f"ids {tuple(ids.shape)} and mask {tuple(mask.shape)} must be two equal (answers, positions), at least one "
            "answer of the class token and one word; give a list of answers and a length of 2 or more"
        )
    lengths = mask.sum(1)
    if not bool((mask == (torch.arange(ids.shape[1], device=mask.device) < lengths[:, None])).all()):
        raise ValueError("an answer has padding before its end; pad answers behind their last word")
    if int(lengths.min()) < 2:
        row = int(lengths.argmin())
        raise ValueError(f"answer {row} has {int(lengths[row])} positions; each needs the class token and a word")
    return lengths


@torch.no_grad()
def prepare_answers(decoder: AnswerDecoder, ids: Tensor, mask: Tensor, *, batch_size: int = 1024) -> AnswerList:
    """The list of answers int64 (A, l), with bool (A, l) False at padding, on the decoder's device.

    Takes the decoder as it is: prepare again after a training step. Raises ValueError: no answer, padding within one, one
    without a word.
    """
    lengths = _require_answers(ids, mask)
    ids = ids[:, : int(lengths.max())]
    parts = []
    for chosen in ids[:, None, :-1].split(batch_size):  # the last word predicts nothing
        x, _ = decoder.layers[0].look_back(decoder.bert.embeddings(chosen))
        parts.append(x[:, 0, 1:])
    return AnswerList(ids, lengths, torch.cat(parts))
