"""Accuracy of a classifier on a list of clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.lists import read_list
from umt_fast.engine.distributed import gather
from umt_fast.models.weights import WeightsError


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor],
    list_path: str,
    data: DataConfig,
    *,
    num_frames: int,
    image_size: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    found: list[dict[str, Any]] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields (`top1`, share), (`top5`, share), (`clips`, count) of all ranks together: one centred view of each clip.

    logits: uint8 video (B, T, S, S, 3) -> (B, classes). A clip that cannot be read raises, it is not left out.
    found: receives the five best classes of each clip with their probabilities, in the list's order.

    Raises WeightsError: logits that are not finite.
    """
    loader = ClipLoader(
        read_list(list_path, data),
        data,
        num_frames=num_frames,
        image_size=image_size,
        batch_size=batch_size,
        train=False,
        rank=rank,
        world_size=world_size,
    )
    hits = torch.zeros(2, device=device)
    count, rows = 0, []
    for batch in loader:
        label = batch["label"].to(device)
        scores = logits(batch["video"].to(device))
        if not scores.isfinite().all():
            raise WeightsError("the classifier's logits are not finite: the run that made this checkpoint diverged")
        best = scores.topk(min(5, scores.shape[1])).indices
        ranked = best == label[:, None]
        hits += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum()])
        count += len(label)
        if found is not None:
            shares = scores.softmax(1).gather(1, best)
            rows += zip(batch["index"].tolist(), label.tolist(), best.tolist(), shares.tolist(), strict=True)
    top1, top5, count = (sum(column) for column in zip(*gather([*hits.tolist(), count]), strict=True))
    top1, top5 = top1 / count, top5 / count
    if found is not None:
        for number, label, classes, shares in sorted(chain.from_iterable(gather(rows))):
            best = [[name, round(share, 5)] for name, share in zip(classes, shares, strict=True)]
            found.append({"clip": loader.name_of(number), "label": label, "found": best})
    yield "top1", top1
    yield "top5", top5
    yield "clips", count
