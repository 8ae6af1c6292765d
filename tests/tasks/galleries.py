"""Small galleries: texts and clips as retrieval reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Captions:
    """Token ids of a gallery, as data.captions.Tokens gives them: as long as the longest text of a batch."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self.ids, self.mask = ids, mask.bool()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(self.mask[rows].sum(1).max())
        return self.ids[rows, :longest], self.mask[rows, :longest]


class Gallery(NamedTuple):
    clips: range
    captions: range
    right: Tensor
