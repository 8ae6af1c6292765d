"""Features of a frozen tower, made once for every clip of a list and kept in memory or in a mapped file."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from umt_fast.config import ConfigError, DataConfig, require
from umt_fast.data.errors import DataError
from umt_fast.data.sources.columns import Clips
from umt_fast.engine.distributed import Ranks, gather
from umt_fast.models.weights import WeightsError
from umt_fast.pretrained import PretrainedModel
from umt_fast.pretrained.passes import clips_for

Feature = Literal["pooled", "tokens"]
# Tokens keep 8 bits of their mantissas, and none can overflow.
DTYPES = {"pooled": torch.float32, "tokens": torch.bfloat16}


class Features(NamedTuple):
    """rows: pooled fp32 (N, C) or tokens bf16 (N, n, C) on the CPU, row i of clip i. index: int64 (V,), the rows that are
    filled, ascending: the other clips cannot be read. label: int64 (V,), theirs."""

    rows: Tensor
    index: Tensor
    label: Tensor


def shape_of(model: PretrainedModel, feature: Feature) -> tuple[int, ...]:
    """The shape of one clip's features."""
    return (model.tower.grid.size, model.vit.width) if feature == "tokens" else (model.vit.width,)


class Room:
    """Where features go: memory up to a bound, beyond it files in a folder, which every rank maps."""

    def __init__(self, ranks: Ranks, memory_gib: float, folder: Path | None) -> None:
        self.ranks, self.memory_gib, self.folder, self.mapped = ranks, memory_gib, folder, False

    def check(self, clips: int, shape: tuple[int, ...], feature: Feature) -> None:
        """Decides, before any work, where the features of so many clips go. Raises ConfigError: there is no room for them."""
        needed = clips * math.prod(shape) * DTYPES[feature].itemsize
        gib = needed / 2**30
        self.mapped = gib > self.memory_gib
        if not self.mapped:
            return
        require(
            self.folder is not None,
            f"the {feature} of {clips} clips take {gib:.4g} GiB, and memory_gib is {self.memory_gib:.4g}; raise it, or give a "
            "folder on a fast disk: --cache FOLDER",
        )
        require(self.folder.is_dir(), f"cache is {self.folder}, which is no folder")
        free = shutil.disk_usage(self.folder).free
        require(
            needed <= free,
            f"the {feature} of {clips} clips take {gib:.4g} GiB, and {self.folder} has {free / 2**30:.4g} GiB left",
        )
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.ranks.world_size)))
        require(
            local == self.ranks.world_size,
            f"a mapped file is shared by the ranks of one machine, and there are {self.ranks.world_size} on several; "
            "raise memory_gib, or use one machine",
        )

    def rows(self, count: int, shape: tuple[int, ...], feature: Feature, name: str) -> Tensor:
        """An empty (count, *shape). A mapped one has no name on disk any more, and goes with the process."""
        if not self.mapped:
            return torch.empty(count, *shape, dtype=DTYPES[feature])
        size = count * math.prod(shape)
        # The first rank's process number, so that two commands may share a folder.
        path = self.folder / f"probe-{gather(os.getpid())[0]}-{name}.features"
        try:
            if self.ranks.first:
                with path.open("xb") as file:
                    file.truncate(size * DTYPES[feature].itemsize)
            gather(None)
            rows = torch.from_file(str(path), shared=True, size=size, dtype=DTYPES[feature])
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{path} cannot be written or mapped ({error}); give another --cache") from error
        finally:
            gather(None)
            if self.ranks.first:
                path.unlink(missing_ok=True)
        return rows.view(count, *shape)


@torch.no_grad()
def features_of(
    model: PretrainedModel,
    clips: Clips,
    data: DataConfig,
    ranks: Ranks,
    room: Room,
    *,
    feature: Feature,
    batch_size: int,
    name: str,
    max_bad_share: float,
) -> Features:
    """Features of all clips that can be read, as evaluation cuts them; ranks share the pass, and each has the features of all.

    Raises DataError: more clips that cannot be read than max_bad_share allows, or none that can. WeightsError: features that
    are not finite.
    """
    loader = clips_for(model, clips, data, ranks, batch_size=batch_size, max_bad_share=max_bad_share)
    rows = room.rows(len(clips), shape_of(model, feature), feature, name)
    filled = torch.zeros(len(clips), dtype=torch.bool)
    batches = iter(loader)
    for _ in range(max(gather(len(loader)))):
        batch = next(batches, None)
        part = None
        if batch is not None and len(batch["index"]):
            tokens, pooled = model.encode_pixels(batch["video"].to(ranks.device))
            found = (tokens if feature == "tokens" else pooled).to(DTYPES[feature]).cpu()
            if not found.isfinite().all():
                raise WeightsError(f"the {feature} are not finite: the run that made this checkpoint diverged")
            if room.mapped:
                rows[batch["index"]] = found  # every rank sees what the others write
            part = batch["index"], None if room.mapped else found
        for index, found in (each for each in gather(part) if each is not None):
            filled[index] = True
            if found is not None:
                rows[index] = found
    index = filled.nonzero()[:, 0]
    if not len(index):
        raise DataError(f"none of the {len(clips)} clips of the {name} list can be read; the reasons are above")
    return Features(rows, index, labels_of(clips)[index])


def labels_of(clips: Clips) -> Tensor:
    """int64 (N,)."""
    column = clips.columns.get("label")
    return torch.zeros(len(clips), dtype=torch.int64) if column is None else column.clone()
