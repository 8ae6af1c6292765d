"""Scores of clips that are judged by several views: segments in time, crops in space.

The official rule: softmax of each view's logits, the mean over the distinct views of a clip, then the best classes. A view that
several ranks saw, as samplers that fill up the last batch make it happen, counts once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from umt_fast.engine.distributed import gather


class Judged(NamedTuple):
    """index: int64 (V,), ascending. scores: float64 (V, classes), mean probabilities. views: int64 (V,), how many each had."""

    index: Tensor
    scores: Tensor
    views: Tensor


class ViewScores:
    """Collects views in any order; a clip's probabilities are summed as soon as all of its views are there."""

    def __init__(self, views: int) -> None:
        """views: distinct views of a clip."""
        self.views = views
        self._open: dict[int, dict[int, Tensor]] = {}
        self._done: dict[int, Tensor] = {}

    def add(self, index: Tensor, view: Tensor, logits: Tensor) -> None:
        """Views of some clips.

        Args:
            index, view: integers (B,), which clip, and which of its views, in [0, views).
            logits: (B, classes) on any device.
        """
        rows = logits.float().softmax(1).cpu()
        for clip, which, row in zip(index.tolist(), view.tolist(), rows, strict=True):
            if not 0 <= which < self.views:
                raise ValueError(
                    f"view {which} of clip {clip} does not exist; views are numbered 0 to {self.views - 1}"
                )
            if clip in self._done:
                continue
            seen = self._open.setdefault(clip, {})
            seen[which] = row
            if len(seen) == self.views:
                self._done[clip] = _mean(self._open.pop(clip))

    def judged(self) -> Judged:
        """All clips of all ranks, the same on each rank. A clip that lacks views is judged by those it has."""
        done: dict[int, Tensor] = {}
        open_: dict[int, dict[int, Tensor]] = {}
        for complete, partial in gather((self._done, self._open)):
            done |= complete
            for clip, seen in partial.items():
                open_.setdefault(clip, {}).update(seen)
        counts = {clip: len(seen) for clip, seen in open_.items()} | dict.fromkeys(done, self.views)
        means = {clip: _mean(seen) for clip, seen in open_.items()} | done
        order = sorted(means)
        scores = torch.stack([means[clip] for clip in order]) if order else torch.empty(0, 0, dtype=torch.float64)
        return Judged(torch.tensor(order), scores, torch.tensor([counts[clip] for clip in order]))


def _mean(seen: dict[int, Tensor]) -> Tensor:
    # In the views' order, so that the sum does not depend on which came first.
    return torch.stack([seen[view] for view in sorted(seen)]).double().mean(0)


def top_shares(scores: Tensor, label: Tensor, k: int) -> float:
    """Share of rows (V, classes) whose label (V,) is among the k best classes."""
    best = scores.topk(min(k, scores.shape[1])).indices
    return (best == label[:, None]).any(1).double().mean().item()


def per_class_accuracy(scores: Tensor, label: Tensor) -> Tensor:
    """float64 (classes,): share of each class's clips whose best class is theirs; NaN for a class without clips."""
    right = scores.argmax(1) == label
    classes = scores.shape[1]
    count = torch.bincount(label, minlength=classes)
    return torch.bincount(label[right], minlength=classes).double() / count
