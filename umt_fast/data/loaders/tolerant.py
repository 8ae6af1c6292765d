"""Clips in their list's order with those left out that cannot be read: for vectors of what there is, not for scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from umt_fast.data.decode.video import VideoError
from umt_fast.data.loaders.clips import ClipLoader, _Read, _stack
from umt_fast.data.loaders.reader import ClipReader, Sample


class _Places(Dataset):
    """Place (epoch, clip number) -> Sample; of a clip that cannot be read, one without a crop and with the reason."""

    def __init__(self, reader: ClipReader) -> None:
        self.reader = reader

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        try:
            return self.reader.read(*place)
        except VideoError as error:
            side = self.reader.image_size
            nothing = np.empty((0, self.reader.num_frames, side, side, 3), np.uint8)
            return Sample(nothing, place[1], 0, {place[1]: str(error)})


def _stack_readable(samples: list[Sample]) -> _Read:
    bad = {number: reason for sample in samples for number, reason in sample.bad.items()}
    good = [sample for sample in samples if not sample.bad]
    if good:
        return _stack(good, None)._replace(bad=bad)
    none = torch.empty(0, dtype=torch.int64)
    return _Read(torch.from_numpy(samples[0].video), none, none, bad, {})


class TolerantLoader(ClipLoader):
    """A ClipLoader of evaluation whose batches lack the clips that cannot be read; a batch may be empty.

    Each is named once in the log and counted in `bad_files`; data.max_bad_share stops as in training. It is no option of the
    commands that use this loader, and so their errors do not name it.
    """

    needs_files = False
    remedy = "Mend these files, or leave them out of the list; `scan` the list to find them all"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, train=False, **options)

    def _beyond(self) -> str:
        share = self.data.max_bad_share
        return f"more than the allowed share of {share}" if share else "and every clip of this list has to be read"

    def _work(self) -> tuple[Dataset, Callable[[list[Any]], Any]]:
        return _Places(self._reader), _stack_readable
