"""Samples of the published classification protocol: training views with its augmentation, validation and test views.

A LabeledReader takes the place of ClipReader in a ClipLoader. In training each of data.num_sample repeats of a clip is
augmented anew from one decode; all that is random follows from (seed, epoch, clip number, repeat). Otherwise a clip gives its
validation view, or all of its test views, whose frames are decoded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from umt_fast.config import AugmentConfig, ConfigError, DataConfig
from umt_fast.data.decode.classification_crops import training_view, validation_view
from umt_fast.data.decode.classification_frames import FrameRule, KineticsDense, KineticsSparse, Ssv2, Ssv2Folder
from umt_fast.data.decode.multi_view import MultiViewReader
from umt_fast.data.decode.video import Chooser, VideoError, decode_pictures
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.reader import ClipReader
from umt_fast.data.sources.clip import Clip
from umt_fast.data.sources.columns import Clips
from umt_fast.data.sources.prepared import StoredChooser

if TYPE_CHECKING:
    from PIL import Image


def frame_rule(augment: AugmentConfig, *, folder: bool = False) -> FrameRule:
    """Which frames `augment.frames` means; folders of pictures have a rule of their own for ssv2."""
    if augment.frames == "dense":
        return KineticsDense(augment.sampling_rate)
    if augment.frames == "kinetics":
        return KineticsSparse()
    return Ssv2Folder() if folder else Ssv2()


class LabeledReader(ClipReader):
    """See the module's head. Picklable and without state."""

    def __init__(
        self,
        clips: Clips,
        data: DataConfig,
        *,
        augment: AugmentConfig,
        segments: int = 1,
        crops: int = 1,
        **kind: Any,
    ) -> None:
        """segments, crops: test views of a clip, in evaluation; 1 and 1: the validation view. kind: as ClipReader takes it.

        Raises ConfigError: more segments than the rule has. DataError: prepared clips read densely.
        """
        super().__init__(clips, data, **kind)
        if augment.frames == "dense" and any(clips.values("shard")):
            raise DataError(
                "prepared clips hold candidates for sparse frames; read the files with augment.frames dense"
            )
        self.augment, self.segments, self.crops_per_segment = augment, segments, crops
        self.policy = None
        if self.train and augment.rand_augment:
            from umt_fast.data.decode.rand_augment import Policy

            self.policy = Policy.parse(augment.rand_augment)
        if self.num_views > 1:
            try:
                self._multi_view(folder=False)
            except ValueError as error:
                raise ConfigError(f"{segments} segments x {crops} crops cannot be judged: {error}") from error

    @property
    def num_views(self) -> int:
        """Views of a clip in evaluation."""
        return self.segments * self.crops_per_segment

    def _multi_view(self, *, folder: bool) -> MultiViewReader:
        rule = frame_rule(self.augment, folder=folder)
        return MultiViewReader(rule, self.num_frames, self.image_size, self.segments, self.crops_per_segment)

    def chooser_of(self, clip: Clip, random_key: tuple[int, ...]) -> Chooser:
        rule = frame_rule(self.augment, folder=clip.frame_folder)

        def choose(count: int) -> np.ndarray:
            if not self.train:
                return rule.validation(count, self.num_frames)
            # A fresh generator each time: asked again with another count, the draws are the same ones.
            return rule.train(count, self.num_frames, np.random.default_rng((*random_key, 0)))

        return choose

    def _whole(self, clip: Clip, choose: Chooser) -> StoredChooser:
        """For evaluation of a prepared clip: the rule's own frames, which must be stored."""

        def chosen(stored: int, source: int) -> np.ndarray:
            if stored < source:
                raise VideoError(
                    f"{clip.name}: {clip.shard} holds {stored} of its {source} frames, and the official views want others; "
                    "judge on the files themselves"
                )
            return choose(stored)

        return chosen

    def views(self, clip: Clip, random_key: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """In training also `erase_box` int64 (num_sample, boxes, 4); with several test views `view` int64 (views,)."""
        if self.train:
            return self._augmented(self.frames(clip, random_key), random_key)
        if self.num_views == 1:
            choose = self.chooser_of(clip, random_key)
            pictures = _array(self.chosen(clip, choose, self._whole(clip, choose)))
            return validation_view(pictures, self.image_size)[None], {}
        reader = self._multi_view(folder=clip.frame_folder)
        plan = reader.plan()
        pictures = self.chosen(clip, plan, self._whole(clip, plan), decode_pictures)
        pictures = [np.asarray(picture) for picture in pictures]
        return reader.views(pictures, plan.frames), {"view": np.arange(self.num_views)}

    def _augmented(
        self, frames: np.ndarray | list[Image.Image], random_key: tuple[int, ...]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        augment = self.augment
        found = [
            training_view(
                frames,
                self.image_size,
                np.random.default_rng((*random_key, 1, repeat)),
                policy=self.policy,
                flip=self.data.flip is not False,
                erasing=augment.erasing,
                erasing_count=augment.erasing_count,
                area=augment.crop_area,
                aspect=augment.crop_aspect,
                interpolation=augment.interpolation,
            )
            for repeat in range(self.data.num_sample)
        ]
        boxes = {"erase_box": np.array([view.boxes for view in found])} if augment.erasing else {}
        return np.stack([view.video for view in found]), boxes


def _array(pictures: np.ndarray | list[Image.Image]) -> np.ndarray:
    if isinstance(pictures, np.ndarray):
        return pictures
    return np.stack([np.asarray(picture) for picture in pictures])
