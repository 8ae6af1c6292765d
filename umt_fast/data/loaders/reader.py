"""One sample on the CPU reader: decode, choose, crop. Everything random follows from (seed, epoch, clip number)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data.decode import cuts, sampling, transforms
from umt_fast.data.decode.video import Chooser, VideoError, decode_frames, read_frame_folder
from umt_fast.data.sources.clip import Clip, absence, absent
from umt_fast.data.sources.prepared import StoredChooser, read_prepared
from umt_fast.data.sources.tars import extracted

if TYPE_CHECKING:
    from PIL import Image

# How many other clips may replace an unreadable one before the loader gives up on that place of the batch.
MAX_ATTEMPTS = 20
# Clips whose files are looked for once that has happened.
_LOOKED_AT = 10000

Read = TypeVar("Read")
Decode = Callable[..., np.ndarray | list[np.ndarray]]
"""Called as decode.video.decode_frames is."""


@dataclass(slots=True)
class Sample:
    """The crops of one place of a batch, and the bad clips met on the way (number -> reason)."""

    video: np.ndarray
    index: int
    label: int
    bad: dict[int, str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays of as many rows as there are crops."""
    cut: str = ""
    """What a clip that is cut in the middle is called (decode/cuts.py); empty: it is whole."""


class ClipReader:
    """Reads place `index` of an epoch. Picklable and without state, so that any process gives the same sample."""

    clips_are_files = True
    """Clips have the paths of files."""

    def __init__(
        self, clips: Sequence[Clip], data: DataConfig, *, num_frames: int, image_size: int, seed: int, train: bool
    ) -> None:
        self.clips, self.data = clips, data
        self.num_frames, self.image_size, self.seed, self.train = num_frames, image_size, seed, train

    def chooser(self, random_key: tuple[int, ...]) -> Chooser:
        """Frame count -> T frame numbers of the clip with that key."""

        def choose(count: int) -> np.ndarray:
            # A fresh generator each time: asked again with another count, the draws are the same ones.
            rng = np.random.default_rng((*random_key, 0))
            if self.data.sampling == "dense":
                rate = self.data.sampling_rate
                if self.train:
                    return sampling.dense_train(count, self.num_frames, rate, rng)
                return sampling.dense_center(count, self.num_frames, rate)
            if self.data.sampling == "intervals":
                if self.train:
                    return sampling.interval_train(count, self.num_frames, rng)
                return sampling.interval_middle(count, self.num_frames)
            return self._sparse(count, rng)

        return choose

    def _sparse(self, count: int, rng: np.random.Generator) -> np.ndarray:
        if self.train:
            return sampling.sparse_train(count, self.num_frames, rng)
        return sampling.sparse_center(count, self.num_frames)

    def stored_chooser(self, random_key: tuple[int, ...]) -> StoredChooser:
        """(stored frames, frames of the source) -> T numbers of stored frames of the prepared clip with that key."""

        def choose(stored: int, source: int) -> np.ndarray:
            if stored == source:
                return self.chooser(random_key)(stored)
            # Candidates were drawn by the rule of data.sampling; of each T-th part of them any is as good.
            return self._sparse(stored, np.random.default_rng((*random_key, 0)))

        return choose

    def frames(self, clip: Clip, random_key: tuple[int, ...]) -> np.ndarray | list[Image.Image]:
        """The T chosen frames of a clip, uint8 (T, H, W, 3), or Pillow's pictures of a prepared one. Raises VideoError."""
        return self.chosen(clip, self.chooser_of(clip, random_key), self.stored_chooser(random_key))

    def chooser_of(self, clip: Clip, random_key: tuple[int, ...]) -> Chooser:
        """The chooser of one clip, for readers whose rule depends on what it is."""
        return self.chooser(random_key)

    def chosen(
        self, clip: Clip, choose: Chooser, stored: StoredChooser, decode: Decode | None = None
    ) -> np.ndarray | list[np.ndarray] | list[Image.Image]:
        """The frames of a clip that `choose` picks, or `stored` from a prepared one. Raises VideoError.

        decode: reads a video file; None: decode_frames, which gives one array.
        """
        decode = decode or decode_frames
        if clip.shard:
            return read_prepared(clip, stored)
        seconds = self.data.max_seconds
        if clip.frame_folder:
            return read_frame_folder(clip.path, choose, clip.num_frames, self.data.frame_pattern)
        if not Path(clip.path).exists():
            raise VideoError(f"{clip.path}: no such file")
        if clip.member:
            with extracted(clip) as path:
                return decode(path, choose, clip.num_frames or None, seconds)
        return decode(clip.path, choose, clip.num_frames or None, seconds)

    def windows(self, width: int, height: int, random_key: tuple[int, ...]) -> list[transforms.Crop]:
        """The num_sample crops of a clip of width x height pixels."""
        flip = self.data.flip is not False
        crops = []
        for repeat in range(self.data.num_sample if self.train else 1):
            rng = np.random.default_rng((*random_key, 1, repeat))
            if self.train and self.data.augment == "random_resized_crop":
                crop = transforms.random_resized_crop(width, height, flip, rng)
            elif self.train and self.data.augment == "multi_scale_crop":
                crop = transforms.multi_scale_crop(width, height, self.image_size, flip, rng)
            elif self.data.augment == "whole":
                crop = transforms.whole(width, height)
            else:
                crop = transforms.center_crop(width, height)
            crops.append(crop)
        return crops

    def crops(self, frames: np.ndarray | list[Image.Image], random_key: tuple[int, ...]) -> np.ndarray:
        """num_sample augmented crops, uint8 (num_sample, T, S, S, 3)."""
        width, height = frames[0].size if isinstance(frames, list) else frames.shape[2:0:-1]
        return np.stack(
            [transforms.apply(frames, crop, self.image_size) for crop in self.windows(width, height, random_key)]
        )

    def views(self, clip: Clip, random_key: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A clip's crops, uint8 (crops, T, S, S, 3), and Sample.columns. Raises VideoError."""
        return self.crops(self.frames(clip, random_key), random_key), {}

    def read(self, epoch: int, index: int) -> Sample:
        """The sample of clip `index` in an epoch, or of the clip that replaces it (`with_replacements`)."""
        with cuts.noted() as found:
            chosen, (video, columns), bad = self.with_replacements(
                epoch, index, lambda number: self.views(self.clips[number], (self.seed, epoch, number))
            )
        return Sample(video, chosen, self.clips[chosen].label, bad, columns, found[-1] if found else "")

    def with_replacements(
        self, epoch: int, index: int, read_one: Callable[[int], Read], known: Mapping[int, str] = MappingProxyType({})
    ) -> tuple[int, Read, dict[int, str]]:
        """What `read_one` gives for clip `index`, or for the first replacement that can be read: (its number, that, bad clips).

        In training, an unreadable clip is replaced by another one drawn from (seed, epoch, index, attempt). In
        evaluation it raises VideoError: a score over other clips than the list's would be wrong. `known` are clips that
        proved unreadable before, with reasons.
        """
        bad: dict[int, str] = {}
        chosen = index
        for attempt in range(MAX_ATTEMPTS):
            try:
                if chosen in known:
                    raise VideoError(known[chosen])
                return chosen, read_one(chosen), bad
            except VideoError as error:
                if not self.train:
                    raise
                bad[chosen] = str(error)
            rng = np.random.default_rng((self.seed, epoch, index, 2, attempt))
            chosen = int(rng.integers(len(self.clips)))
        raise VideoError(f"{MAX_ATTEMPTS} clips in a row cannot be read: {self._why_none(list(bad.values()))}")

    def _why_none(self, reasons: list[str]) -> str:
        """The first reasons, and how many of the list's first files are not there at all."""
        said = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        if not self.clips_are_files:
            return said
        missing, count = absent(self.clips[number] for number in range(min(_LOOKED_AT, len(self.clips))))
        which = "the list" if len(self.clips) <= _LOOKED_AT else f"the list's first {_LOOKED_AT} clips"
        return f"{said}. {absence(missing, count, which)}" if missing else said
