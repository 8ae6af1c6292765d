"""The loader of clips that data.reader names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from umt_fast.config import DataConfig
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.clip import Clip


def open_loader(clips: Sequence[Clip], data: DataConfig, *, device: torch.device, **kind: Any) -> ClipLoader:
    """A loader of the kind that data.reader names; `kind` as ClipLoader takes it.

    Raises DataError: what the list lacks, or a reader that is not installed.
    """
    if data.reader != "dali":
        return ClipLoader(clips, data, **kind)
    try:
        from umt_fast.data.loaders.dali import DaliLoader
    except ImportError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise DataError(
            "data.reader is dali, but NVIDIA DALI is not installed; pip install 'umt_fast[dali]', or take data.reader cpu"
        ) from error
    return DaliLoader(clips, data, device=device, **kind)
