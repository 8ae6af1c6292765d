"""Batches of clips around key frames with their boxes, in the order, the shares and the worker processes of ClipLoader."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from umt_fast.config import ConfigError, DataConfig, KeyFrameConfig, VitConfig
from umt_fast.data.decode.detection_clip import Temporal
from umt_fast.data.decode.detection_view import Sample, ViewRule, batched, test_sample, training_sample
from umt_fast.data.decode.movies import Movies, open_movies
from umt_fast.data.decode.video import VideoError
from umt_fast.data.loaders.clips import ClipLoader, _Places, _Read
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.detections import KeyFrames


class KeyFrameRule(NamedTuple):
    """How a key frame becomes a sample. patch: pixels that sides are padded to a multiple of. max_boxes: of a clip in
    training."""

    temporal: Temporal
    view: ViewRule
    patch: int
    max_boxes: int


def temporal_of(clips: KeyFrameConfig, num_frames: int) -> Temporal:
    """Which frames around a key frame are seen."""
    if clips.frames == "still":
        return Temporal.of_key_frame(num_frames=num_frames)
    described = clips.frames == "described"
    return Temporal.official(sparse=clips.sparse, as_described=described, num_frames=num_frames, rate=clips.stride)


def rule_of(clips: KeyFrameConfig, vit: VitConfig) -> KeyFrameRule:
    """How key frames become samples of a detector."""
    view = ViewRule(
        short_side=clips.short_side,
        crop=vit.image_size,
        hue=clips.hue,
        saturation=clips.saturation,
        brightness=clips.brightness,
        mirror=clips.mirror,
    )
    return KeyFrameRule(temporal_of(clips, vit.num_frames), view, vit.patch_size, clips.max_boxes)


def movies_of(clips: KeyFrameConfig, data: DataConfig, list_path: str | Path) -> Movies:
    """The movies below data.root, or beside the list. Raises ConfigError: data.root is no folder."""
    root = Path(data.root) if data.root else Path(list_path).resolve().parent
    if not root.is_dir():
        raise ConfigError(f"{data.root} is not a folder; give one as --root (train: --data.root), or leave it out")
    pattern, rate = clips.frame_pattern, clips.frame_rate
    return open_movies(clips.movies, root, pattern=pattern, rate=rate, first_second=clips.first_second)


class _Drawn(NamedTuple):
    """A sample, and the key frames that could not be read on the way (number -> reason)."""

    sample: Sample
    bad: dict[int, str]


class KeyFrameReader(ClipReader):
    """Reads place `index` of an epoch as a random view with moved boxes in training, the whole picture else."""

    clips_are_files = False

    def __init__(
        self,
        keys: KeyFrames,
        clips: Clips,
        movies: Movies,
        rule: KeyFrameRule,
        data: DataConfig,
        seed: int,
        train: bool,
    ) -> None:
        super().__init__(
            clips, data, num_frames=rule.temporal.num_frames, image_size=rule.view.crop, seed=seed, train=train
        )
        self.keys, self.movies, self.rule = keys, movies, rule

    def read(self, epoch: int, index: int) -> _Drawn:  # type: ignore[override]
        """Everything random follows from (seed, epoch, key frame). Raises VideoError in evaluation, and where no replacement
        can be read either."""

        def read_one(chosen: int) -> Sample:
            key = self.keys[chosen]
            frames = self.movies.read(key.movie, key.second, self.rule.temporal)
            if not self.train:
                return test_sample(chosen, key, frames, self.rule.view)
            rng = np.random.default_rng((self.seed, epoch, chosen))
            return training_sample(chosen, key, frames, self.rule.view, rng, self.rule.max_boxes)

        _, sample, bad = self.with_replacements(epoch, index, read_one)
        return _Drawn(sample, bad)


def _stack(drawn: list[_Drawn | VideoError], rule: KeyFrameRule, train: bool) -> _Read | VideoError:
    for one in drawn:
        if isinstance(one, VideoError):
            return one
    samples = [one.sample for one in drawn]
    batch = batched(samples, multiple=rule.patch, boxes_per_clip=rule.max_boxes if train else None)
    bad = {number: reason for one in drawn for number, reason in one.bad.items()}
    return _Read(batch.pop("video"), batch.pop("index"), torch.empty(0), bad, batch)


class KeyFrameLoader(ClipLoader):
    """Iterates over one epoch's batches from the current position.

    A batch is what data.decode.detection_view.batched gives, on the CPU. In training every clip has rule.max_boxes rows and is
    a square of view.crop pixels, so that all batches of a run have one shape; in evaluation pictures are whole, and padded to
    the largest of their batch.
    """

    remedy = "Mend the movies, or leave these key frames out"
    needs_files = False  # its clips are key frames, whose movies are required below

    def __init__(
        self,
        keys: KeyFrames,
        movies: Movies,
        rule: KeyFrameRule,
        data: DataConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train: bool = True,
    ) -> None:
        """Raises DataError: pixels of a key frame are missing, or a list too short for a step."""
        movies.require(keys.places())
        names = Clips.of(Clip(path=keys.name_of(number)) for number in range(len(keys)))
        super().__init__(
            names,
            data,
            num_frames=rule.temporal.num_frames,
            image_size=rule.view.crop,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            train=train,
        )
        self.keys, self.rule = keys, rule
        self._reader = KeyFrameReader(keys, self.clips, movies, rule, data, seed, train)

    @functools.cached_property
    def identity(self) -> str:
        """What a state belongs to: the key frames with their boxes and classes."""
        return self.keys.identity()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            del batch["label"]
            yield batch

    def _work(self) -> tuple[Dataset, Callable[[list[Any]], Any]]:
        return _Places(self._reader), functools.partial(_stack, rule=self.rule, train=self.train)
