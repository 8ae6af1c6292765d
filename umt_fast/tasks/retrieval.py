"""Zero-shot retrieval: captions find clips and clips captions, by embeddings, then by the matching head for the best of them.

Legend: V clips, N captions. Scores are (V, N); figures are named from the query's side: `t2v` captions search clips.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.captions import CaptionList, Tokens
from umt_fast.data.loader import ClipLoader
from umt_fast.models.multimodal import VideoText

_EXCLUDED = -100.0


def recalls(scores: Tensor, right: Tensor, prefix: str) -> dict[str, float]:
    """R@1, R@5, R@10 (shares of queries) and the median rank, from scores (queries, items) and right answers (bool, same).

    A query's rank is that of its best right item; items that score the same as it count as half before it, so constant
    scores do not look like a hit.
    """
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    wrong = ~right
    rank = ((scores > best) & wrong).sum(1) + ((scores == best) & wrong).sum(1) / 2
    figures = {f"{prefix}_r{k}": (rank < k).float().mean().item() for k in (1, 5, 10)}
    return figures | {f"{prefix}_median_rank": rank.median().item() + 1}


@torch.no_grad()
def encode_clips(
    model: VideoText, captions: CaptionList, data: DataConfig, *, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Every different clip of a list once, unmasked: unit embeddings (V, E), tokens (V, N, C) on the CPU, and their rows."""
    rows = sorted(set(captions.sample))
    vit = model.vision_encoder.encoder.config
    loader = ClipLoader(
        [captions.clips[row] for row in rows], data, num_frames=vit.num_frames, image_size=vit.image_size,
        batch_size=batch_size, train=False,
    )  # fmt: skip
    embeddings, kept = [], []
    for batch in loader:
        tokens, _ = model.vision_encoder.embed(batch["video"].to(device))
        frames = model.vision_encoder.encoder.grid.frames
        embeddings.append(model.project_vision(model.vision_encoder.pool(tokens, frames)))
        kept.append(tokens.cpu())
    return torch.cat(embeddings), torch.cat(kept), rows


class Texts(NamedTuple):
    """Unit embeddings (N, E); on the CPU the text layers' outputs (N, l, W) and their padding masks (N, l)."""

    embeddings: Tensor
    hidden: Tensor
    mask: Tensor


@torch.no_grad()
def encode_texts(model: VideoText, tokens: Tokens, count: int, *, batch_size: int, device: torch.device) -> Texts:
    """All captions through the text layers, once."""
    embeddings = []
    ids, mask = tokens[torch.arange(count)]
    hidden = torch.empty(*ids.shape, model.text_encoder.config.width)
    for first in range(0, count, batch_size):
        rows = slice(first, first + batch_size)
        part = model.text_encoder.encode(ids[rows].to(device), mask[rows].to(device))
        embeddings.append(model.project_text(part))
        hidden[rows] = part.cpu()
    return Texts(torch.cat(embeddings), hidden, mask)


@torch.no_grad()
def rerank(
    model: VideoText, dual: Tensor, clips: Tensor, texts: Texts, *, top_k: int, pairs: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Matching-head logits for the best pairs: (V, N) for clips searching captions, (V, N) for captions searching clips.

    For each clip its top_k captions by the dual scores, for each caption its top_k clips; all other cells are excluded.
    Keys and values of a clip are computed once, `pairs` captions ask it side by side.
    """
    count_v, count_n = dual.shape
    by_clip, by_text = (torch.zeros_like(dual, dtype=torch.bool) for _ in range(2))
    by_clip.scatter_(1, dual.topk(min(top_k, count_n), dim=1).indices, True)
    by_text.scatter_(0, dual.topk(min(top_k, count_v), dim=0).indices, True)
    logits = torch.full_like(dual, _EXCLUDED)
    wanted = (by_clip | by_text).cpu()
    text = model.text_encoder
    for number in range(count_v):
        keys = text.clip_keys(clips[number : number + 1].to(device))
        for chosen in wanted[number].nonzero()[:, 0].split(pairs):
            hidden, mask = texts.hidden[chosen].to(device), texts.mask[chosen].to(device)
            fused = text.fuse(hidden[:, None], mask[:, None], keys)
            logits[number, chosen.to(device)] = model.match(fused[:, 0])[:, 1].float()
    return logits.masked_fill(~by_clip, _EXCLUDED), logits.masked_fill(~by_text, _EXCLUDED)


def evaluate(
    model: VideoText,
    captions: CaptionList,
    tokens: Tokens,
    data: DataConfig,
    *,
    top_k: int = 128,
    batch_size: int = 32,
    pairs: int = 256,
    show: int = 0,
    device: torch.device,
) -> dict[str, Any]:
    """Recalls both ways by embeddings (`dual_*`) and after re-ranking (`match_*`); the official protocol.

    Right answers are the rows of a query's own sample. Scores after re-ranking are the matching logits alone. With `show`,
    `found` has for the first so many captions the rows of their three best clips, and which of them are right.
    """
    model.eval()
    clip_embeddings, clip_tokens, rows = encode_clips(model, captions, data, batch_size=batch_size, device=device)
    texts = encode_texts(model, tokens, len(captions.captions), batch_size=4 * batch_size, device=device)
    dual = clip_embeddings @ texts.embeddings.t()
    right = torch.tensor(rows, device=device)[:, None] == torch.tensor(captions.sample, device=device)[None]
    figures: dict[str, Any] = {"clips": len(rows), "captions": len(captions.captions)}
    figures |= recalls(dual, right, "dual_v2t") | recalls(dual.t(), right.t(), "dual_t2v")
    if top_k:
        v2t, t2v = rerank(model, dual, clip_tokens, texts, top_k=top_k, pairs=pairs, device=device)
        figures |= recalls(v2t, right, "match_v2t") | recalls(t2v.t(), right.t(), "match_t2v")
        dual = t2v
    if show:
        figures["found"] = [
            {
                "caption": captions.captions[query],
                "clips": [rows[n] for n in best],
                "right": right[best, query].tolist(),
            }
            for query, best in enumerate(dual[:, :show].topk(min(3, len(rows)), dim=0).indices.t().tolist())
        ]
    return figures
