"""Retrieval: captions find clips and clips captions, by embeddings, then by the matching head for the best of them.

Legend: V clips, N captions, Q queries of either kind. Figures are named from the query's side: `t2v` captions search clips. No
array of all scores is ever made (ranking.py), so that what is held grows with V + N and not with V x N.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

from umt_fast.config import DataConfig, Dtype
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.queries import Queries
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.models.video_text import Matching
from umt_fast.models.weights import WeightsError
from umt_fast.tasks.ranking import Found, both_ways, judge, search

# Items listed for each query where the matching head re-ranks fewer.
LISTED = 10


class Keeper:
    """Gives out tensors to be filled: in main memory up to a limit, beyond it mapped from a file that is gone at exit.

    Spilled tokens are read once and in order, which a disk does well; making them again would decode every clip twice.
    """

    def __init__(self, limit: int, dtype: Dtype = "fp32") -> None:
        """limit: bytes of main memory. dtype: of what is kept; bf16 takes half the room."""
        self.left, self.dtype = limit, torch.bfloat16 if dtype == "bf16" else torch.float32

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized tensor. Raises DataError where neither memory nor disk will hold it."""
        size = self.dtype.itemsize * math.prod(shape)
        if size <= self.left:
            self.left -= size
            return torch.empty(shape, dtype=self.dtype)
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if size > free:
            raise DataError(
                f"{size / 2**30:.1f} GiB of tokens are to be kept, but --memory_gib leaves {self.left / 2**30:.1f} and "
                f"{folder} has {free / 2**30:.1f} free; raise --memory_gib, set TMPDIR to a larger disk, or use more ranks"
            )
        handle, path = tempfile.mkstemp(prefix="umt_fast_", suffix=".tokens")
        try:
            os.posix_fallocate(handle, 0, size)  # a disk that fills up later would kill the process
            return torch.from_file(path, shared=True, size=math.prod(shape), dtype=self.dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)


def computing(device: torch.device, dtype: Dtype) -> torch.autocast:
    """Products in bf16 within the block, or as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


class Gallery(NamedTuple):
    """Unit embeddings (V, E) of all clips; the vision tokens (v, n, C) of this rank's, which are every world_size-th."""

    embeddings: Tensor
    tokens: Tensor


@torch.no_grad()
def encode_clips(
    model: Matching,
    queries: Queries,
    data: DataConfig,
    keeper: Keeper,
    ranks: Ranks,
    *,
    batch_size: int,
    dtype: Dtype = "fp32",
) -> Gallery:
    """Every clip once over all ranks, unmasked.

    A rank with fewer batches embeds nothing for the rest: parts of a sharded model are gathered by all ranks together.
    """
    vit = model.vision_encoder.encoder.config
    grid = model.vision_encoder.encoder.grid
    loader = ClipLoader(
        queries.clips,
        data,
        num_frames=vit.num_frames,
        image_size=vit.image_size,
        batch_size=batch_size,
        train=False,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    mine = len(range(ranks.rank, len(queries.clips), ranks.world_size))
    kept = keeper.empty(mine, grid.frames * grid.per_frame, vit.width)
    embeddings = torch.empty(mine, model.vision_proj.out_features)
    done = 0
    most, batches = -(-len(queries.clips) // ranks.world_size), iter(loader)
    nothing = torch.zeros(1, vit.num_frames, vit.image_size, vit.image_size, 3, dtype=torch.uint8)
    for _ in range(-(-most // batch_size)):
        batch = next(batches, None)
        with computing(ranks.device, dtype):
            tokens, _ = model.vision_encoder.embed((nothing if batch is None else batch["video"]).to(ranks.device))
            unit = model.project_vision(model.vision_encoder.pool(tokens, grid.frames))
        if batch is not None:
            rows = slice(done, done := done + len(tokens))
            embeddings[rows], kept[rows] = unit.cpu(), tokens.cpu()
    joint = torch.empty(len(queries.clips), embeddings.shape[1])
    for rank, part in enumerate(gather(embeddings)):
        joint[rank :: ranks.world_size] = part
    return Gallery(joint, kept)


class Texts(NamedTuple):
    """Unit embeddings (N, E), the text layers' outputs (N, l, W), and the length (N,) of each that is no padding."""

    embeddings: Tensor
    hidden: Tensor
    lengths: Tensor

    def rows(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Outputs (B, l, W) and mask (B, l) of some captions, l the longest of them."""
        lengths = self.lengths[chosen]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return self.hidden[chosen, :longest].to(device), mask.to(device)


@torch.no_grad()
def encode_texts(
    model: Matching, tokens: Tokens, keeper: Keeper, *, batch_size: int, device: torch.device, dtype: Dtype = "fp32"
) -> Texts:
    """All captions through the text layers, once. Every rank does all: re-ranking needs them wherever clips are."""
    count = len(tokens)
    batches = torch.arange(count).split(batch_size)
    lengths = torch.cat([tokens[rows][1].sum(1) for rows in batches])
    hidden = keeper.empty(count, int(lengths.max()), model.text_encoder.config.width)
    embeddings = []
    for rows in batches:
        ids, mask = tokens[rows]
        with computing(device, dtype):
            part = model.text_encoder.encode(ids.to(device), mask.to(device))
            embeddings.append(model.project_text(part).cpu())
        kept = hidden[rows[0] : rows[-1] + 1]
        kept[:, : part.shape[1]] = part.cpu()
        kept[:, part.shape[1] :] = 0  # padding beside longer captions: NaN left in memory would pass a mask, as 0 * NaN
    return Texts(torch.cat(embeddings), hidden, lengths)


@torch.no_grad()
def match_scores(
    model: Matching,
    tokens: Tensor,
    texts: Texts,
    wanted: Tensor,
    ranks: Ranks,
    *,
    count: int,
    pairs: int,
    dtype: Dtype = "fp32",
) -> Tensor:
    """Matching logits (m,) of the wanted pairs, sorted numbers clip * count + caption; each rank does those of its clips.

    Keys and values of a clip are computed once, `pairs` captions ask it side by side.
    """
    text = model.text_encoder
    numbers, texts_of = wanted // count, wanted % count
    mine = (numbers % ranks.world_size == ranks.rank).nonzero()[:, 0]
    own = torch.empty(len(mine))
    clips, sizes = numbers[mine].unique_consecutive(return_counts=True)
    done = 0
    for clip, rows in zip(clips.tolist(), mine.split(sizes.tolist()), strict=True):
        with computing(ranks.device, dtype):
            keys = text.clip_keys(tokens[clip // ranks.world_size][None].to(ranks.device))
            for chosen in texts_of[rows].split(pairs):
                hidden, mask = texts.rows(chosen, ranks.device)
                fused = text.fuse(hidden[:, None], mask[:, None], keys, asked=1)  # the head reads the class token
                own[done : (done := done + len(chosen))] = model.match(fused[:, 0])[:, 1].float().cpu()
    joint = torch.empty(len(wanted))
    for rows, part in gather((mine, own)):
        joint[rows] = part
    return joint


def rerank(
    model: Matching,
    clips: Gallery,
    texts: Texts,
    queries: Queries,
    v2t: Found,
    t2v: Found,
    ranks: Ranks,
    *,
    pairs: int,
    dtype: Dtype = "fp32",
) -> dict[str, tuple[Found, Found]]:
    """Candidates of both directions, (of clips, of captions), in new orders; a pair that both want is computed once.

    `match`: by the matching logits. `both`: by their sum with similarity over temperature, the logits of the contrastive loss.
    """
    count_v, count_n = len(queries.clips), len(queries.captions)
    by_clip = torch.arange(count_v)[:, None] * count_n + v2t.items
    by_text = t2v.items * count_n + torch.arange(count_n)[:, None]
    wanted = torch.cat([by_clip.flatten(), by_text.flatten()]).unique()
    logits = match_scores(model, clips.tokens, texts, wanted, ranks, count=count_n, pairs=pairs, dtype=dtype)
    own, other = (logits[torch.searchsorted(wanted, keys)] for keys in (by_clip, by_text))
    temperature = model.temperature.detach().cpu()
    return {
        name: (
            judge(v2t.items, own + share * v2t.scores, queries.right, count_n),
            judge(t2v.items, other + share * t2v.scores, _turned(queries.right), count_v),
        )
        for name, share in (("match", 0.0), ("both", 1 / temperature))
    }


def _turned(right: Tensor) -> Tensor:
    """Pairs (P, 2) seen from the other side, sorted."""
    return right[right[:, 1].argsort(stable=True)].flip(1)


def evaluate(
    model: Matching,
    queries: Queries,
    tokens: Tokens,
    data: DataConfig,
    ranks: Ranks,
    *,
    top_k: int = 128,
    batch_size: int = 32,
    pairs: int = 256,
    memory: int = 8 << 30,
    dtype: Dtype = "fp32",
) -> tuple[dict[str, float], Found, Found]:
    """Recalls both ways by embeddings (`dual_*`) and after re-ranking (`match_*`), and what clips and captions found.

    The official protocol: for each clip its top_k captions by embeddings, for each caption its top_k clips are ordered by the
    matching logits alone; the rest ties below them. `both_*`, not official, orders them by embeddings and matching together
    (see rerank). Every rank returns the same.

    Args:
        top_k: 0: no re-ranking; more than there is: all.
        batch_size: clips per rank and step. pairs: captions that ask a clip at once.
        memory: bytes of main memory for vision tokens and text outputs on each rank; beyond it they go to a temporary file.
        dtype: what products are computed in, and those tokens and outputs kept in. Embeddings are compared in fp32.

    Raises:
        DataError: a clip that cannot be read (a score over others than the list's would be wrong), no room for tokens.
        WeightsError: embeddings or logits that are not finite.
    """
    model.eval()
    keeper = Keeper(memory, dtype)
    texts = encode_texts(model, tokens, keeper, batch_size=4 * batch_size, device=ranks.device, dtype=dtype)
    clips = encode_clips(model, queries, data, keeper, ranks, batch_size=batch_size, dtype=dtype)
    if not (texts.embeddings.isfinite().all() and clips.embeddings.isfinite().all()):
        raise WeightsError("the model's embeddings are not finite: the run that made this checkpoint diverged")
    # The first rank's lists are everyone's: another device might order near-ties otherwise.
    found = None
    if ranks.first:
        sides, listed = (clips.embeddings, texts.embeddings), top_k or LISTED
        v2t = search(*sides, queries.right, listed, device=ranks.device)
        found = v2t, search(*sides[::-1], _turned(queries.right), listed, device=ranks.device)
    v2t, t2v = gather(found)[0]
    figures: dict[str, float] = {"clips": len(queries.clips), "captions": len(queries.captions)}
    figures |= both_ways(v2t.place, t2v.place, "dual")
    if top_k:
        ordered = rerank(model, clips, texts, queries, v2t, t2v, ranks, pairs=pairs, dtype=dtype)
        v2t, t2v = ordered["match"]
        if not (v2t.scores.isfinite().all() and t2v.scores.isfinite().all()):
            raise WeightsError("the matching head's scores are not finite: the run that made this checkpoint diverged")
        for name, (own, other) in ordered.items():
            figures |= both_ways(own.place, other.place, name)
    return figures, v2t, t2v
