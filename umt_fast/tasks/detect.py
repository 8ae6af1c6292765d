"""`eval detect`: frame mAP of a detector on key frames, with a person detector's boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from umt_fast.config import ConfigError, DataConfig, KeyFrameConfig, VitConfig, require
from umt_fast.data.decode.movies import Movies
from umt_fast.data.loaders.key_frames import KeyFrameLoader, rule_of
from umt_fast.data.sources import ava_csv, detections
from umt_fast.data.sources.ava_csv import Frame
from umt_fast.data.sources.detections import AVA_CLASSES, KeyFrames
from umt_fast.engine.distributed import Ranks
from umt_fast.models.description import vit_config
from umt_fast.models.weights import WeightsFile, fit_detector
from umt_fast.tasks import detected
from umt_fast.tasks.base import EvalOptions
from umt_fast.tasks.detection import Detection, movies_of
from umt_fast.tasks.frame_map import read_boxes, read_label_map

# fmt: off
AVA_JUDGED = (
    1, *range(3, 16), 17, 20, 22, 24, *range(26, 31), 34, 36, 37, 38, 41, 43, *range(45, 50), 51, 52, 54, *range(56, 71),
    72, 73, 74, *range(76, 81),
)
# fmt: on
"""The 60 of AVA's 80 classes that its benchmark judges, by number."""


@dataclass(frozen=True, kw_only=True)
class JudgedBy:
    """What detections are judged by. truth: AVA's ground truth. boxes: a person detector's, .csv or .json. annotations: with
    .json boxes, the file whose images they name. label_map: the judged classes (.pbtxt); empty: AVA's 60 of 80, else all.
    excluded: key frames that are not judged. Empty texts: there is none."""

    truth: Path
    boxes: str
    annotations: str = ""
    label_map: str = ""
    excluded: str = ""
    min_box_score: float = detections.MIN_SCORE

    def __post_init__(self) -> None:
        require(bool(self.boxes), f"there are no boxes for {self.truth}; give a person detector's: --boxes FILE")
        json = self.boxes.endswith(".json")
        if json and not self.annotations:
            raise ConfigError(
                f"{self.boxes} names images by number; give the file that lists them: --annotations FILE.json"
            )
        require(
            json or not self.annotations,
            f"annotations is {self.annotations}, and {self.boxes} names movies and seconds itself; leave it out",
        )

    def key_frames(self, movies: Movies, num_classes: int, excluded: set[Frame]) -> KeyFrames:
        """The key frames to classify. Raises DataError."""
        if self.annotations:
            return detections.test_frames(self.annotations, self.boxes, self.min_box_score, num_classes)
        names = ava_csv.movies_of(self.truth)
        score = self.min_box_score
        return ava_csv.test_frames(self.boxes, movies.sizes(names), set(names), score, num_classes, excluded)

    def names(self, num_classes: int) -> dict[int, str]:
        """The judged classes. Raises DataError, ConfigError: a label map that cannot be read, or is of other classes."""
        if not self.label_map:
            judged = AVA_JUDGED if num_classes == AVA_CLASSES else range(1, num_classes + 1)
            return {number: str(number) for number in judged}
        names = read_label_map(self.label_map)
        beyond = next((number for number in names if not 1 <= number <= num_classes), None)
        require(
            beyond is None,
            f"{self.label_map} has class {beyond}, and its classes are 1 to {num_classes}; give the label map of those",
        )
        return names


def judge(
    scores: Callable[[dict[str, Tensor]], Tensor],
    by: JudgedBy,
    clips: KeyFrameConfig,
    vit: VitConfig,
    data: DataConfig,
    *,
    num_classes: int,
    batch_size: int,
    ranks: Ranks,
    result: Path | None = None,
) -> dict[str, Any]:
    """`map`, `per_class` (classes with true boxes), `key_frames` and `boxes`, over all ranks and the same on each.

    Args:
        scores: batch -> (N, classes), as Detection.scores.
        clips, vit: how the detector sees clips.
        data: where the movies are, and workers.
        result: CSV file for all detections, as detected.evaluate has it.
    """
    excluded = ava_csv.read_excluded(by.excluded) if by.excluded else set()
    movies = movies_of(clips, data, by.truth)
    keys = by.key_frames(movies, num_classes, excluded)
    names = by.names(num_classes)
    loader = KeyFrameLoader(
        keys,
        movies,
        rule_of(clips, vit),
        data,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        train=False,
    )
    truth, device = read_boxes(by.truth), ranks.device
    found = detected.evaluate(scores, loader, keys, truth, names, device=device, excluded=excluded, result=result)
    known = {name: value for name, value in found.per_class.items() if not math.isnan(value)}
    return {"map": found.mean, "key_frames": len(keys), "boxes": keys.count_boxes(), "per_class": known}


@dataclass(frozen=True, kw_only=True)
class DetectOptions(EvalOptions):
    """What `eval detect` reads besides the clips."""

    boxes: str = ""
    """A person detector's boxes: .csv (movie,second,x1,y1,x2,y2,class,score), or .json (image_id, bbox, score)."""
    annotations: str = ""
    """With .json boxes: the annotation file (.json) whose images they name."""
    label_map: str = ""
    """Classes that are judged (.pbtxt); empty: the 60 of AVA's 80 that its benchmark judges, else all."""
    excluded: str = ""
    """CSV file of key frames `movie,second` that are not judged."""
    min_box_score: float = detections.MIN_SCORE
    """Boxes of a lower score are not classified."""
    movies: Literal["seconds", "frames", "whole"] = "seconds"
    """Below --root: MOVIE/SECOND.mp4, folders MOVIE of extracted frames, or a file MOVIE.mp4 each."""
    movie_frames: str = "{movie}_{:06d}.jpg"
    """With --movies frames: a frame's file, its number (from 1) in braces, and {movie} where the movie's name goes."""
    frame_rate: float = 30.0
    """With --movies frames: frames a second."""
    first_second: int = 900
    """With --movies frames and whole: the second that the first frame shows."""

    def clips(self, described: dict[str, Any]) -> KeyFrameConfig:
        """How the described detector sees clips of these movies."""
        where = {"movies": self.movies, "frame_pattern": self.movie_frames}
        where |= {"frame_rate": self.frame_rate, "first_second": self.first_second}
        return KeyFrameConfig(**described["clips"], **where)


class Detect:
    """Frame mAP at IoU 0.5; LIST is AVA's ground truth (.csv)."""

    name = "detect"
    tasks = ("detection",)
    Options = DetectOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: DetectOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """Figures as `judge` gives them; options.scores receives all detections as AVA's CSV."""
        shared = ("boxes", "annotations", "label_map", "excluded", "min_box_score")
        by = JudgedBy(truth=list_path, **{name: getattr(options, name) for name in shared})
        vit, count = vit_config(described), described["num_classes"]
        objective = Detection(vit, num_classes=count, bf16=described["dtype"] == "bf16")
        fit_detector(objective.detector, file.state, str(source))
        objective.to(ranks.device).eval()
        return judge(
            objective.scores,
            by,
            options.clips(described),
            vit,
            data,
            num_classes=count,
            batch_size=options.batch_size,
            ranks=ranks,
            result=options.scores,
        )
