"""The plain implementation of stage 2: what the official step computes, in straightforward PyTorch.

It is the baseline of `bench stage2` and a second opinion in the tests: the same parameters under the same names give
the same four losses and gradients as the fast implementation when both are given the same masks, hidden words and negatives.
On top of what stage1.py does, it runs the text layers a second time over masked text, the fusion layers over three copies of
the batch and once more for masked text, projects each clip's keys and values anew for every copy, computes vocabulary logits
at all positions of texts padded to their longest allowed length, recomputes the text activations in the backward pass,
draws hidden words on the host, and reads each loss every step, because the official step does so.

Legend: B clips, n visible tokens, l text positions, W text width, C vision width, K aligned layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from umt_fast.config import Stage2Config, TextConfig
from umt_fast.masking import TokenGrid
from umt_fast.reference.stage1 import Decoder, PlainStudent, PlainTeacher, draw_mask, targets_at


class SelfAttention(nn.Module):
    """query, key, value with the whole attention map in memory; keys and values of text or of vision tokens."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)
        self.dropout = nn.Dropout(config.attention_dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self._heads(self.query(x)), self._heads(self.key(source)), self._heads(self.value(source))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias
        weights = self.dropout(scores.softmax(-1))
        return (weights @ v).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """dense, dropout, residual, LayerNorm."""

    def __init__(self, inner: int, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Attention and its output layer."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, source_width)
        self.output = Output(config.width, config)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        return self.output(self.self(x, source, bias), x)


class Intermediate(nn.Module):
    """The first half of the MLP."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, 4 * config.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """A BERT layer, with cross-attention where it fuses."""

    def __init__(self, config: TextConfig, vision_width: int | None) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        self.crossattention = None if vision_width is None else Attention(config, vision_width)
        self.intermediate = Intermediate(config)
        self.output = Output(4 * config.width, config)

    def forward(self, x: Tensor, bias: Tensor, vision: Tensor | None) -> Tensor:
        x = self.attention(x, x, bias)
        if self.crossattention is not None:
            x = self.crossattention(x, vision, None)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    """Word, position and type embeddings."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        x = x + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.dropout(self.LayerNorm(x))


class Transform(nn.Module):
    """The masked-language head before its decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """The masked-language head."""

    def __init__(self, config: TextConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = Transform(config.width)
        self.decoder = nn.Linear(config.width, config.vocab_size)
        self.decoder.weight = words.weight
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class PlainText(nn.Module):
    """BERT in its two modes: text layers alone, or fusion layers over text and vision tokens of equally many rows."""

    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.fusion_layer = config.fusion_layer
        layers = (Layer(config, vision_width if n >= config.fusion_layer else None) for n in range(config.depth))
        encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.bert = nn.ModuleDict({"embeddings": Embeddings(config), "encoder": encoder})
        self.cls = nn.ModuleDict({"predictions": Predictions(config, self.bert["embeddings"].word_embeddings)})

    def _run(self, x: Tensor, mask: Tensor, vision: Tensor | None) -> Tensor:
        layers = self.bert["encoder"]["layer"]
        bias = (1 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        for layer in layers[: self.fusion_layer] if vision is None else layers[self.fusion_layer :]:
            x = checkpoint(layer, x, bias, vision, use_reentrant=False) if self.training else layer(x, bias, vision)
        return x

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 (B, l), bool (B, l) -> (B, l, W)."""
        return self._run(self.bert["embeddings"](ids), mask, None)

    def fuse(self, text: Tensor, mask: Tensor, vision: Tensor) -> Tensor:
        """(R, l, W) text and (R, n, C) vision tokens, row by row."""
        return self._run(text, mask, vision)


class PlainTower(PlainStudent):
    """The student with a norm for its pooled output and stage 2's heads."""

    def __init__(self, config: Stage2Config, grid: TokenGrid) -> None:
        super().__init__(config, grid)
        width, dim = config.student.width, config.teacher.output_dim
        self.clip_decoder = nn.ModuleList(Decoder(width, dim, "none", 1e-5) for _ in self.clip_decoder)
        self.pool_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, T, H, W), mask (B, N) true: hidden -> tokens (B, n, C), pooled (B, 1, C), heads (K, B, n, D)."""
        features = self.encoder(video, mask)
        tokens = features[-1]
        return tokens, self.pool_norm(tokens.mean(1, keepdim=True)), self.decode(features, mask)


class PlainVideoText(nn.Module):
    """Everything stage 2 trains, under the official names."""

    def __init__(self, config: Stage2Config) -> None:
        super().__init__()
        vit, text = config.student, config.text
        grid = TokenGrid.of(
            num_frames=vit.num_frames,
            tubelet_size=vit.tubelet_size,
            image_size=vit.image_size,
            patch_size=vit.patch_size,
        )
        self.vision_encoder = PlainTower(config, grid)
        self.text_encoder = PlainText(text, vit.width)
        self.vision_proj = nn.Linear(vit.width, config.embed_dim)
        self.text_proj = nn.Linear(text.width, config.embed_dim)
        self.itm_head = nn.Linear(text.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))


class Words(NamedTuple):
    """Captions padded to their longest allowed length: ids and masked ids int64 (B, l), mask bool, labels -100 for none."""

    ids: Tensor
    mask: Tensor
    masked_ids: Tensor
    labels: Tensor


class PlainStage2(nn.Module):
    """The official training step without its optimizer."""

    def __init__(self, config: Stage2Config, mask_id: int) -> None:
        super().__init__()
        self.config, self.mask_id = config, mask_id
        self.model = PlainVideoText(config)
        self.teacher = PlainTeacher(config.teacher, config.align.num_layers, "none")
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PlainStage2:
        super().train(mode)
        self.teacher.eval()
        return self

    def hide_words(self, ids: Tensor, mask: Tensor, special: tuple[int, ...]) -> Words:
        """BERT's masking, drawn on the host."""
        chosen = torch.bernoulli(torch.full(ids.shape, self.config.mask_words)).bool().to(ids.device) & mask
        for number in special:
            chosen[ids == number] = False
        masked, labels = ids.clone(), ids.clone()
        labels[~chosen] = -100
        replaced = torch.bernoulli(torch.full(ids.shape, 0.8)).bool().to(ids.device) & chosen
        masked[replaced] = self.mask_id
        other = torch.bernoulli(torch.full(ids.shape, 0.5)).bool().to(ids.device) & chosen & ~replaced
        words = torch.randint(self.config.text.vocab_size, ids.shape).to(ids.device)
        masked[other] = words[other]
        return Words(ids, mask, masked, labels)

    def losses(
        self,
        video: Tensor,
        features: Tensor,
        hidden: Tensor,
        words: Words,
        index: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The four losses; hidden: bool (B, N), true: not seen; negatives: (clip of each text, text of each clip)."""
        model = self.model
        with torch.no_grad():
            model.temp.clamp_(0.001, 0.5)
        text_encoder = model.text_encoder
        tokens, pooled, heads = model.vision_encoder(video, hidden)
        text = text_encoder.encode(words.ids, words.mask)

        vision = F.normalize(model.vision_proj(pooled), dim=-1)
        sentence = F.normalize(model.text_proj(text[:, 0]), dim=-1)
        v2t = torch.einsum("bte,ce->btc", vision, sentence).mean(1) / model.temp
        equal = (index[:, None] == index[None]).float()
        targets = equal / equal.sum(1, keepdim=True)
        vtc = -(F.log_softmax(v2t, 1) * targets).sum(1).mean() - (F.log_softmax(v2t.t(), 1) * targets).sum(1).mean()

        clip_of, text_of = negatives or self._draw_negatives(v2t.detach(), equal)
        pairs = torch.cat([text, text, text[text_of]])
        seen = torch.cat([tokens, tokens[clip_of], tokens])
        masks = torch.cat([words.mask, words.mask, words.mask[text_of]])
        logits = model.itm_head(text_encoder.fuse(pairs, masks, seen)[:, 0])
        label = torch.ones(len(logits), dtype=torch.long, device=logits.device)
        label[len(text) :] = 0

        masked = text_encoder.encode(words.masked_ids, words.mask)
        scores = text_encoder.cls["predictions"](text_encoder.fuse(masked, words.mask, tokens))
        mlm = F.cross_entropy(scores.flatten(0, 1).float(), words.labels.flatten())

        aims = targets_at(features, hidden)
        align = self.config.align
        if align.normalize == "l2":
            aims, heads = (x / x.norm(dim=-1, keepdim=True) for x in (aims, heads))
        if align.loss == "l2":
            uta = (2 - 2 * (heads * aims).sum(-1)).mean()
        else:
            uta = (F.mse_loss if align.loss == "mse" else F.smooth_l1_loss)(heads, aims)
        return {"vtc": vtc / 2, "vtm": F.cross_entropy(logits.float(), label), "mlm": mlm, "uta": uta}

    def _draw_negatives(self, v2t: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
        drawn = []
        for scores in (v2t.t(), v2t):
            weights = (scores + 1e-4).float().softmax(1).masked_fill(equal > 0, 0).nan_to_num(0.01, 0.01, 0.01)
            drawn.append(torch.multinomial(weights, 1)[:, 0])
        return drawn[0], drawn[1]

    def draw_mask(self, attention: Tensor, batch: int) -> Tensor:
        """The visible tokens of clips, or of images where a row of attention (B*T, L) is a whole sample."""
        ratio = (self.config.image_mask if len(attention) == batch else self.config.mask).ratio
        return draw_mask(attention, batch, ratio)
