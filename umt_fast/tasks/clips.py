"""Clips as most tasks take them: those of a list with labels, and random ones of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import ConfigError, DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.opening import open_loader
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.lists import read_list
from umt_fast.engine.distributed import Ranks


def clip_loader(
    config: Any, clips: Sequence[Clip], num_frames: int, ranks: Ranks, data: DataConfig | None = None, **options: Any
) -> ClipLoader:
    """The loader of some clips with the settings of a run; data: other settings than config.data; options: as ClipLoader's."""
    return open_loader(
        clips,
        data or config.data,
        device=ranks.device,
        num_frames=num_frames,
        image_size=config.student.image_size,
        batch_size=config.run.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.run.seed,
        **options,
    )


def training_list(config: Any) -> Sequence[Clip]:
    """The clips of data.train. Raises ConfigError where it is empty, DataError where it cannot be read."""
    if not config.data.train:
        raise ConfigError("data.train is empty; give a list of videos: --data.train list.csv")
    return read_list(config.data.train, config.data)


def counted_clips(config: Any) -> tuple[int, str] | None:
    """Clips of an epoch, counted in data.train, and where the number is from; None where it is not set."""
    if not config.data.train:
        return None
    return len(read_list(config.data.train, config.data)), f"counted in {config.data.train}"


def listed_clips(config: Any, ranks: Ranks) -> ClipLoader:
    """The loader of data.train."""
    return clip_loader(config, training_list(config), config.student.num_frames, ranks)


def random_integers(most: int, *shape: int, least: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers in [least, most), the same at every call of one shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(least, most, shape, generator=generator, dtype=dtype)


def random_clips(config: Any, num_frames: int) -> dict[str, Tensor]:
    """A batch of random clips as a loader gives it, labels 0."""
    side, repeats = config.student.image_size, config.data.num_sample
    index = torch.arange(config.run.batch_size).repeat_interleave(repeats)
    video = random_integers(256, len(index), num_frames, side, side, 3, dtype=torch.uint8)
    return {"video": video, "index": index, "label": torch.zeros_like(index)}
