"""Which items of a gallery are nearest to a query, exactly, and at which rank the right ones stand.

Legend: Q queries, I items, E width of their embeddings, P pairs of a query with a right item. No array of all Q x I scores is
ever made: queries and items are compared block by block, on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries and items whose scores are held at once: 128 MiB of them.
_QUERIES, _ITEMS = 512, 1 << 16


class Found(NamedTuple):
    """For Q queries the k best items, best first, their scores, and the place of the best right answer."""

    items: Tensor
    scores: Tensor
    place: Place

    @property
    def rank(self) -> Tensor:
        """The expected rank (Q,) of the best right answer, 0: first."""
        return self.place.rank


class Place(NamedTuple):
    """Where the best right items of Q queries stand: how many wrong items are before each, and how many are level with it.

    Items that are level stand in any order, each as likely: ranks and recalls are those that are expected then. So constant
    scores look neither like a hit nor like a miss.
    """

    before: Tensor
    level: Tensor

    @property
    def rank(self) -> Tensor:
        """The expected rank (Q,), 0: first: half of the items that are level are before it."""
        return self.before + self.level / 2

    def recall(self, k: int) -> Tensor:
        """The probability fp64 (Q,) that it is among the first k."""
        return ((k - self.before).double() / (self.level + 1)).clamp(0, 1)


def place_of(scores: Tensor, right: Tensor) -> Place:
    """The place of each query's best right item, from scores (Q, I) and right answers (bool, same)."""
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    return _place(scores, right, best)


def _place(scores: Tensor, right: Tensor, best: Tensor) -> Place:
    """How many wrong items score above `best` (Q, 1), and how many the same."""
    wrong = ~right
    return Place(((scores > best) & wrong).sum(1), ((scores == best) & wrong).sum(1))


def recalls(place: Place, prefix: str) -> dict[str, float]:
    """R@1, R@5, R@10 (shares of queries) and the median rank, counted from 1; of equal scores as Place says."""
    figures = {f"{prefix}_r{k}": place.recall(k).mean().item() for k in (1, 5, 10)}
    return figures | {f"{prefix}_median_rank": place.rank.median().item() + 1}


def both_ways(v2t: Place, t2v: Place, prefix: str) -> dict[str, float]:
    """The recalls of both directions and `r_mean`, the mean of all six."""
    figures = recalls(v2t, f"{prefix}_v2t") | recalls(t2v, f"{prefix}_t2v")
    six = [value for name, value in figures.items() if "_r" in name and "rank" not in name]
    return figures | {f"{prefix}_r_mean": sum(six) / len(six)}


def official_recalls(v2t: Place, t2v: Place) -> dict[str, float]:
    """The recalls of both directions under their official names, in per cent: `txt_*` clips find captions, `img_*`
    captions find clips.

    The official figures, but for R@k with less than k candidates re-ranked: officially a right answer that is no candidate
    then has the place that a sort happens to leave it among the other equal ones; here see Place.
    """
    figures = {}
    for name, place in (("txt", v2t), ("img", t2v)):
        shares = [100 * place.recall(k).mean().item() for k in (1, 5, 10)]
        figures |= dict(zip((f"{name}_r1", f"{name}_r5", f"{name}_r10"), shares, strict=True))
        figures[f"{name}_r_mean"] = sum(shares) / 3
    return figures | {"r_mean": (figures["txt_r_mean"] + figures["img_r_mean"]) / 2}


class _Blocks:
    """Scores of queries (Q, E) on a device, block by block of items: pairs of the first item and (Q, b); many times over."""

    def __init__(self, queries: Tensor, items: Tensor, *, cosine: bool = False) -> None:
        """cosine: scores are divided by the lengths of items."""
        self.queries, self.items, self.cosine = queries, items, cosine
        self.held = list(self._computed()) if len(items) <= _ITEMS else None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return iter(self.held) if self.held is not None else self._computed()

    def _computed(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self.items), _ITEMS):
            block = self.items[first : first + _ITEMS].to(self.queries.device)
            scores = self.queries @ block.t()
            # Dividing the few scores copies no items, as bringing these to unit length would.
            yield first, scores / block.norm(dim=1).clamp_min(1e-12) if self.cosine else scores


def nearest(
    queries: Tensor, items: Tensor, k: int, *, device: torch.device | None = None, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """The k best items of each query by the product of embeddings, best first: their numbers and scores (Q, k), on the CPU.

    Args:
        queries, items: (Q, E) and (I, E). Items may lie elsewhere, in a mapped file too: a block of them is moved at a time.
        k: more than I: all.
        device: where products are computed; None: where the queries are.
        cosine: by the cosine instead.
    """
    device = device or queries.device
    queries = F.normalize(queries, dim=1) if cosine else queries
    parts = []
    for rows in queries.split(_QUERIES):
        parts.append([part.cpu() for part in _best(_Blocks(rows.to(device), items, cosine=cosine), k)])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _best(blocks: _Blocks, k: int) -> tuple[Tensor, Tensor]:
    found = []
    for first, block in blocks:
        own = block.topk(min(k, block.shape[1]), dim=1)
        found = [*found, (own.values, own.indices + first)]
        if len(found) > 1:
            scores, numbers = (torch.cat(column, 1) for column in zip(*found, strict=True))
            kept = scores.topk(min(k, scores.shape[1]), dim=1)
            found = [(kept.values, numbers.gather(1, kept.indices))]
    ((scores, numbers),) = found
    return numbers, scores


def search(queries: Tensor, items: Tensor, right: Tensor, top_k: int, *, device: torch.device | None = None) -> Found:
    """The best items of each query, as nearest gives them, and the place of the best right one; on the CPU.

    right: int64 (P, 2), query and item of every right pair, sorted. A pair's score is computed again for its place, in the same
    block, and so comes out the same.
    """
    device = device or queries.device
    parts = []
    for first in range(0, len(queries), _QUERIES):
        rows = queries[first : first + _QUERIES].to(device)
        begin, end = torch.searchsorted(right[:, 0].contiguous(), torch.tensor([first, first + len(rows)])).tolist()
        pairs = right[begin:end] - torch.tensor([first, 0])
        blocks = _Blocks(rows, items)
        numbers, scores = _best(blocks, top_k)
        best = torch.full((len(rows), 1), float("-inf"), device=device)
        for start, block in blocks:
            own = block.masked_fill(~_hits(pairs, start, block), float("-inf"))
            best = torch.maximum(best, own.amax(1, keepdim=True))
        counts = zip(*(_place(block, _hits(pairs, start, block), best) for start, block in blocks), strict=True)
        parts.append((numbers.cpu(), scores.cpu(), *(sum(column).cpu() for column in counts)))
    numbers, scores, before, level = (torch.cat(column) for column in zip(*parts, strict=True))
    return Found(numbers, scores, Place(before, level))


def _hits(pairs: Tensor, start: int, block: Tensor) -> Tensor:
    """bool, as a block of scores that begins at item `start`: where pairs of a row and an item are."""
    own = pairs[(pairs[:, 1] >= start) & (pairs[:, 1] < start + block.shape[1])].to(block.device)
    hits = torch.zeros_like(block, dtype=torch.bool)
    hits[own[:, 0], own[:, 1] - start] = True
    return hits


def judge(candidates: Tensor, scores: Tensor, right: Tensor, items: int) -> Found:
    """Candidates (Q, k) of `items` items in the order of new scores, (Q, k); the other items tie below all of these."""
    count = torch.arange(len(candidates))[:, None]
    hits = torch.isin(count * items + candidates, right[:, 0] * items + right[:, 1])
    place, found = place_of(scores, hits), hits.any(1)
    wrong = (~hits).sum(1)
    beyond = items - candidates.shape[1] - torch.bincount(right[:, 0], minlength=len(candidates))
    place = Place(torch.where(found, place.before, wrong), torch.where(found, place.level, beyond))
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return Found(candidates.gather(1, ordered.indices), ordered.values, place)
