"""One sample on the CPU road: decode, choose, crop. Everything random follows from (seed, epoch, clip number)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data import sampling, transforms
from umt_fast.data.manifest import Clip
from umt_fast.data.tars import extracted
from umt_fast.data.video import VideoError, decode_frames, read_frame_folder

# How many other clips may stand in for an unreadable one before the loader gives up on that place of the batch.
MAX_ATTEMPTS = 20


@dataclass(slots=True)
class Sample:
    """The crops of one place of a batch, and the bad clips met on the way (number -> reason)."""

    video: np.ndarray
    index: int
    label: int
    bad: dict[int, str]


class ClipReader:
    """Reads place `index` of an epoch. Picklable and without state, so that any process gives the same sample."""

    def __init__(
        self, clips: Sequence[Clip], data: DataConfig, *, num_frames: int, image_size: int, seed: int, train: bool
    ) -> None:
        self.clips, self.data = clips, data
        self.num_frames, self.image_size, self.seed, self.train = num_frames, image_size, seed, train

    def frames(self, clip: Clip, random_key: tuple[int, ...]) -> np.ndarray:
        """The chosen frames of a clip, uint8 (T, H, W, 3). Raises VideoError."""

        def choose(count: int) -> np.ndarray:
            # A fresh generator each time: asked again with another count, the draws are the same ones.
            rng = np.random.default_rng((*random_key, 0))
            if self.data.sampling == "dense":
                rate = self.data.sampling_rate
                if self.train:
                    return sampling.dense_train(count, self.num_frames, rate, rng)
                return sampling.dense_center(count, self.num_frames, rate)
            if self.train:
                return sampling.sparse_train(count, self.num_frames, rng)
            return sampling.sparse_center(count, self.num_frames)

        if clip.frame_folder:
            return read_frame_folder(clip.path, choose, clip.num_frames, self.data.frame_pattern)
        if not Path(clip.path).exists():
            raise VideoError(f"{clip.path}: no such file")
        if clip.member:
            with extracted(clip) as path:
                return decode_frames(path, choose, clip.num_frames or None)
        return decode_frames(clip.path, choose, clip.num_frames or None)

    def crops(self, frames: np.ndarray, random_key: tuple[int, ...]) -> np.ndarray:
        """num_sample augmented crops, uint8 (num_sample, T, S, S, 3)."""
        height, width = frames.shape[1:3]
        out = []
        for repeat in range(self.data.num_sample if self.train else 1):
            rng = np.random.default_rng((*random_key, 1, repeat))
            if self.train and self.data.augment == "random_resized_crop":
                crop = transforms.random_resized_crop(width, height, self.data.flip, rng)
            elif self.train and self.data.augment == "multi_scale_crop":
                crop = transforms.multi_scale_crop(width, height, self.image_size, self.data.flip, rng)
            elif self.data.augment == "whole":
                crop = transforms.Crop(0, 0, width, height)
            else:
                crop = transforms.center_crop(width, height)
            out.append(transforms.apply(frames, crop, self.image_size))
        return np.stack(out)

    def read(self, epoch: int, index: int) -> Sample:
        """The sample of clip `index` in an epoch, or of the clip that stands in for it.

        In training, an unreadable clip is replaced by another one drawn from (seed, epoch, index, attempt). In
        evaluation it raises VideoError: a score over other clips than the list's would be wrong.
        """
        bad: dict[int, str] = {}
        chosen = index
        for attempt in range(MAX_ATTEMPTS):
            clip, key = self.clips[chosen], (self.seed, epoch, chosen)
            try:
                video = self.crops(self.frames(clip, key), key)
                return Sample(video, chosen, clip.label, bad)
            except VideoError as error:
                if not self.train:
                    raise
                bad[chosen] = str(error)
            rng = np.random.default_rng((self.seed, epoch, index, 2, attempt))
            chosen = int(rng.integers(len(self.clips)))
        raise VideoError(f"{MAX_ATTEMPTS} clips in a row cannot be read; the last: {list(bad.values())[-1]}")
