"""Loaders of clips and images together: in turn, or a batch of each in one step."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umt_fast.data.loaders.captions import CaptionLoader


class _Joint:
    """Several loaders as one: clip numbers of the second follow those of the first, and so on."""

    def __init__(self, parts: list[CaptionLoader]) -> None:
        self.parts = parts
        self.epoch, self.position = 0, 0
        self.first = [0]
        for part in parts:
            self.first.append(self.first[-1] + len(part.sample))

    @property
    def bad_files(self) -> dict[str, str]:
        return {name: reason for part in self.parts for name, reason in part.bad_files.items()}

    @property
    def identity(self) -> str:
        return " ".join(part.identity for part in self.parts)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        parts = [part.state_dict() for part in self.parts]
        return {"epoch": self.epoch, "position": self.position, "parts": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        for part, its in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its)

    def name_of(self, index: int) -> str:
        which = bisect.bisect_right(self.first, index) - 1
        return self.parts[which].name_of(index - self.first[which])


class AlternatingLoader(_Joint):
    """Batches of several loaders in turn, each batch from one of them, in an order that the seed draws for each epoch.

    Every loader runs to its end in every epoch.
    """

    kinds = 1

    def __init__(self, parts: list[CaptionLoader], seed: int) -> None:
        super().__init__(parts)
        self.seed = seed

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for part in self.parts:
            part.set_epoch(epoch)

    def order(self, epoch: int) -> list[int]:
        """Which loader gives each batch of an epoch; the same on every rank."""
        turns = np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])
        return np.random.default_rng((self.seed, epoch, 3)).permutation(turns).tolist()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = [iter(part) for part in self.parts]
        try:
            for which in self.order(self.epoch)[self.position :]:
                batch = next(batches[which])
                self.position += 1
                yield batch | {"index": batch["index"] + self.first[which]}
        finally:
            for part in batches:
                part.close()


class PackedLoader(_Joint):
    """A batch of clips and a batch of images in every step; the images' tensors have `image_` before their names.

    An epoch is as long as the longer list is. The shorter one starts over whenever it ends, in its own next epoch's order,
    and goes on where it was in the next epoch of both.
    """

    kinds = 2

    def __init__(self, clips: CaptionLoader, images: CaptionLoader) -> None:
        super().__init__([clips, images])

    def __len__(self) -> int:
        return max(len(part) for part in self.parts)

    def _endless(self, part: CaptionLoader) -> Iterator[dict[str, Tensor]]:
        """A part's batches from where this epoch has it, pass after pass; nothing where it has none."""
        epoch, position = divmod(self.epoch * len(self) + self.position, len(part))
        part.load_state_dict(part.state_dict() | {"epoch": epoch, "position": position})
        while True:
            batches = iter(part)
            try:
                yield from batches
            finally:
                batches.close()
            epoch += 1
            part.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        clips, images = (self._endless(part) for part in self.parts)
        try:
            while self.position < len(self):
                clip, image = next(clips), next(images)
                self.position += 1
                numbers = torch.cat([clip["index"], image["index"] + self.first[1]])
                yield clip | {f"image_{name}": value for name, value in image.items()} | {"index": numbers}
        finally:
            clips.close()
            images.close()
