"""Accuracy of a classifier on a list of clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.loader import ClipLoader
from umt_fast.data.manifest import read_list
from umt_fast.engine.distributed import gather


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
) -> Iterator[tuple[str, float]]:
    """Yields (`top1`, share), (`top5`, share), (`clips`, count) of all ranks together: one centred view of each clip.

    logits: uint8 video (B, T, S, S, 3) -> (B, classes). A clip that cannot be read raises, it is not left out.
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
    count = 0
    for batch in loader:
        label = batch["label"].to(device)
        scores = logits(batch["video"].to(device))
        ranked = scores.topk(min(5, scores.shape[1])).indices == label[:, None]
        hits += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum()])
        count += len(label)
    top1, top5, count = (sum(column) for column in zip(*gather([*hits.tolist(), count]), strict=True))
    top1, top5 = top1 / count, top5 / count
    yield "top1", top1
    yield "top5", top5
    yield "clips", count
