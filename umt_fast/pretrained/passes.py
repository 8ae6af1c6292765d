"""One pass of a trained model over a list of clips, which ranks share."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from umt_fast.config import DataConfig
from umt_fast.data.loaders.tolerant import TolerantLoader
from umt_fast.data.sources.columns import Clips
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.pretrained.base import PretrainedModel

log = logging.getLogger("umt_fast")


def clips_for(
    model: PretrainedModel,
    clips: Clips,
    data: DataConfig,
    ranks: Ranks,
    *,
    batch_size: int,
    max_bad_share: float = 1.0,
) -> TolerantLoader:
    """Batches of this rank's clips in their order, cut for the model, without those that cannot be read.

    Args:
        data: how clips are read; frames and crops are the model's own.
        max_bad_share: share of clips that may be left out. More raise DataError during the pass.
    """
    own = model.view
    view = dataclasses.replace(
        own,
        workers=data.workers,
        frame_pattern=data.frame_pattern,
        max_seconds=data.max_seconds,
        max_bad_share=max_bad_share,
    )
    return TolerantLoader(
        clips,
        view,
        num_frames=model.vit.num_frames,
        image_size=model.vit.image_size,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def embed(
    model: PretrainedModel, clips: Clips, data: DataConfig, ranks: Ranks, *, batch_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Numbers (V,) of the clips that can be read, ascending, and their vectors (V, ...) by name, on the CPU; on every rank."""
    loader = clips_for(model, clips, data, ranks, batch_size=batch_size)
    numbers: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    for batch in loader:
        if len(batch["index"]):
            numbers.append(batch["index"])
            found = model.vectors_of_pixels(batch["video"].to(model.device))
            parts.append({name: value.cpu() for name, value in found.items()})
    _warn_of_cuts(loader, ranks)
    gathered = [part for part in gather(_joined(numbers, parts)) if part is not None]
    if not gathered:
        return torch.empty(0, dtype=torch.int64), {}
    index = torch.cat([part[0] for part in gathered])
    order = index.argsort()
    return index[order], {name: torch.cat([part[1][name] for part in gathered])[order] for name in gathered[0][1]}


def _warn_of_cuts(loader: TolerantLoader, ranks: Ranks) -> None:
    """One line on the first rank that counts the clips of all ranks that are cut in the middle."""
    found: dict[int, str] = {}
    for part in gather(loader.cut_files):
        found |= part
    if found and ranks.first:
        log.warning(
            "%d of %d clips are cut in the middle, and their vectors are of the frames that decode; the first: %s. `scan` the "
            "list to name them all",
            len(found),
            len(loader.clips),
            found[min(found)],
        )


def _joined(numbers: list[Tensor], parts: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]] | None:
    if not numbers:
        return None
    return torch.cat(numbers), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
