"""`eval detect`: frame mAP of a detector on key frames, with a person detector's boxes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from umt_fast.config import DataConfig, JudgingConfig, KeyFrameConfig, require
from umt_fast.data.sources.detections import MIN_SCORE
from umt_fast.engine.distributed import Ranks
from umt_fast.models.description import vit_config
from umt_fast.models.weights import WeightsFile, fit_detector
from umt_fast.tasks.base import EvalOptions, register_evaluation
from umt_fast.tasks.detection import Detection
from umt_fast.tasks.judge import Judge


@dataclass(frozen=True, kw_only=True)
class DetectOptions(EvalOptions):
    """How a detector is judged."""

    boxes: str = ""
    """A person detector's boxes: .csv (movie,second,x1,y1,x2,y2,class,score), or .json (image_id, bbox, score)."""
    annotations: str = ""
    """With .json boxes: the annotation file (.json) whose images they name."""
    label_map: str = ""
    """Classes that are judged (.pbtxt); empty: the 60 of AVA's 80 that its benchmark judges, else all."""
    excluded: str = ""
    """CSV file of key frames `movie,second` that are not judged."""
    min_box_score: float = MIN_SCORE
    """Boxes of a lower score are not classified."""
    movies: Literal["seconds", "frames", "whole"] = "seconds"
    """Below --root: MOVIE/SECOND.mp4, folders MOVIE of extracted frames, or a file MOVIE.mp4 each."""
    frame_pattern: str = "{movie}_{:06d}.jpg"
    """With --movies frames: a frame's file, its number (from 1) in braces, and {movie} where the movie's name goes."""
    frame_rate: float = 30.0
    """With --movies frames: frames a second."""
    first_second: int = 900
    """With --movies frames and whole: the second that the first frame shows."""
    scores: Path | None = None
    """CSV file for all detections in AVA's format: movie,second,x1,y1,x2,y2,class,score."""

    def clips(self, described: dict[str, Any]) -> KeyFrameConfig:
        """How the described detector sees clips of these movies."""
        names = ("movies", "frame_pattern", "frame_rate", "first_second")
        return KeyFrameConfig(**described["clips"], **{name: getattr(self, name) for name in names})

    def judging(self) -> JudgingConfig:
        """What its detections are judged by."""
        return JudgingConfig(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(JudgingConfig)})


class Detect:
    """Frame mAP at IoU 0.5 of boxes with actions; LIST is AVA's ground truth (.csv)."""

    name, tasks, Options = "detect", ("detection",), DetectOptions

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
        """Figures as Judge gives them; options.scores receives all detections."""
        seconds = options.max_seconds
        require(seconds == 0, f"max_seconds is {seconds}, and key frames are seconds of movies; leave it out")
        vit, count = vit_config(described), described["num_classes"]
        judge = Judge(list_path, options.judging(), options.clips(described), vit, data, count)
        objective = Detection(vit, num_classes=count, bf16=described["dtype"] == "bf16")
        fit_detector(objective.detector, file.state, str(source))
        objective.to(ranks.device).eval()
        return judge.figures(objective.scores, batch_size=options.batch_size, ranks=ranks, result=options.scores)


register_evaluation(Detect())
