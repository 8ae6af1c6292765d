"""A ClipLoader's batches with the captions of their clips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.tokens import Tokens


class CaptionLoader:
    """A ClipLoader's batches with the captions of their clips: adds `ids`, `mask` and `sample` to each."""

    kinds = 1

    def __init__(self, clips: ClipLoader, tokens: Tokens, sample: Tensor) -> None:
        self.clips, self.sample = clips, sample
        clips.add_columns(tokens.columns)

    @property
    def bad_files(self) -> dict[str, str]:
        return self.clips.bad_files

    @property
    def identity(self) -> str:
        return self.clips.identity

    def __len__(self) -> int:
        return len(self.clips)

    def set_epoch(self, epoch: int) -> None:
        self.clips.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.clips.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clips.load_state_dict(state)

    def name_of(self, index: int) -> str:
        return self.clips.name_of(index)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self.clips)
        try:
            for batch in batches:
                yield batch | {"sample": self.sample[batch["index"]]}
        finally:
            batches.close()
