"""What a detector finds on key frames, judged as AVA is: the files it is judged by, the clips, the figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umt_fast.config import ConfigError, DataConfig, JudgingConfig, KeyFrameConfig, VitConfig, require
from umt_fast.data.decode.movies import Movies
from umt_fast.data.loaders.key_frames import KeyFrameLoader, movies_of, rule_of
from umt_fast.data.sources import ava_csv, detections
from umt_fast.data.sources.detections import AVA_CLASSES, KeyFrames
from umt_fast.engine.distributed import Ranks
from umt_fast.tasks import detected
from umt_fast.tasks.frame_map import read_boxes, read_label_map

_JUDGED = "1 3-15 17 20 22 24 26-30 34 36-38 41 43 45-49 51 52 54 56-70 72-74 76-80"
AVA_JUDGED = tuple(
    number
    for first, _, last in (each.partition("-") for each in _JUDGED.split())
    for number in range(int(first), int(last or first) + 1)
)
"""The 60 of AVA's 80 classes that its benchmark judges, by number."""


class Judge:
    """Files read once, clips read anew for every judgment."""

    def __init__(
        self,
        truth: Path,
        by: JudgingConfig,
        clips: KeyFrameConfig,
        vit: VitConfig,
        data: DataConfig,
        num_classes: int,
    ) -> None:
        """
        Args:
            truth: AVA's ground truth.
            clips, vit: how the detector sees clips.
            data: where the movies are (data.root), and workers.

        Raises ConfigError, DataError: a file that is missing or cannot be used, movies that are missing.
        """
        if not by.boxes:
            raise ConfigError(
                f"{truth} needs a person detector's boxes; give them: --boxes FILE (train: --judging.boxes)"
            )
        self.vit, self.data, self.rule, self.num_classes = vit, data, rule_of(clips, vit), num_classes
        self.movies = movies_of(clips, data, truth)
        self.excluded = ava_csv.read_excluded(by.excluded) if by.excluded else set()
        self.names = names_of(by.label_map, num_classes)
        self.keys = self._keys(truth, by, self.movies)
        self.movies.require(self.keys.places())
        self.truth = read_boxes(truth)

    def _keys(self, truth: Path, by: JudgingConfig, movies: Movies) -> KeyFrames:
        if by.annotations:
            return detections.test_frames(by.annotations, by.boxes, by.min_box_score, self.num_classes)
        names, score = ava_csv.movies_of(truth), by.min_box_score
        return ava_csv.test_frames(by.boxes, movies.sizes(names), set(names), score, self.num_classes, self.excluded)

    def figures(
        self,
        scores: Callable[[dict[str, Tensor]], Tensor],
        *,
        batch_size: int,
        ranks: Ranks,
        result: Path | None = None,
    ) -> dict[str, Any]:
        """`map` (0 to 1), `per_class` (of classes with true boxes), `key_frames`, `boxes`: of all ranks, the same on each.

        Args:
            scores: batch -> (N, classes), as Detection.scores.
            result: CSV file for all detections, as detected.evaluate has it.

        Raises as detected.evaluate; DataError: a clip that cannot be read.
        """
        loader = KeyFrameLoader(
            self.keys,
            self.movies,
            self.rule,
            self.data,
            batch_size=batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            train=False,
        )
        found = detected.evaluate(
            scores,
            loader,
            self.keys,
            self.truth,
            self.names,
            device=ranks.device,
            excluded=self.excluded,
            idle=self._idle(),
            result=result,
        )
        known = {name: value for name, value in found.per_class.items() if not math.isnan(value)}
        boxes = self.keys.count_boxes()
        return {"map": found.mean, "key_frames": len(self.keys), "boxes": boxes, "per_class": known}

    def _idle(self) -> dict[str, Tensor]:
        side = self.vit.image_size
        return {
            "video": torch.zeros(1, self.vit.num_frames, side, side, 3, dtype=torch.uint8),
            "sizes": torch.tensor([[side, side]]),
            "boxes": torch.zeros(1, 4),
            "box_clip": torch.zeros(1, dtype=torch.int64),
            "scores": torch.zeros(1),
        }


def names_of(label_map: str, num_classes: int) -> dict[int, str]:
    """The judged classes. Raises DataError, ConfigError: a label map that cannot be read, or is of other classes."""
    if not label_map:
        judged = AVA_JUDGED if num_classes == AVA_CLASSES else range(1, num_classes + 1)
        return {number: str(number) for number in judged}
    names = read_label_map(label_map)
    beyond = next((number for number in names if not 1 <= number <= num_classes), None)
    require(
        beyond is None,
        f"{label_map} has class {beyond}, and the detector's are 1 to {num_classes}; give the label map of its classes",
    )
    return names
